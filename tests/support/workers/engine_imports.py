"""What an engine imports, for the server that ranks are forked from."""

import peft  # noqa: F401
from vllm.platforms import current_platform

# vLLM compiles a few small functions of its sampler with Inductor: seconds of a C++ compiler in each worker.
current_platform.simple_compile_backend = "eager"

import vllm.entrypoints.llm  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
