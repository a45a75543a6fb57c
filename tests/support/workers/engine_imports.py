"""What an engine imports, for the server that ranks are forked from."""

import peft  # noqa: F401
import vllm.entrypoints.llm
import vllm.v1.worker.cpu_worker  # noqa: F401
