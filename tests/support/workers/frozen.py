"""The last import of the server that ranks are forked from: garbage collection leaves alone what is there already.

Otherwise each full collection of a rank visits all objects of torch, vLLM and transformers, and copies the memory
that they share with the server. DeepSpeed collects at each start of an engine: one second in every rank.
"""

import atexit
import gc

gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # libraries that count what they hold at the end would report leaks
