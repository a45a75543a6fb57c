"""Of each process that a test starts. Python would look at all objects that vLLM's imports make again and again, which
is a fifth of the time that they take."""

import gc

gc.set_threshold(100_000, 50, 100)
