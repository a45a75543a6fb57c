"""vLLM: its own parallel layers, its paged attention, and its engine as a host of models.

Importing this package imports no vLLM; its rooms do, on first use.
"""

from polyshard.adapters.vllm.adapter import VllmAdapter

adapter = VllmAdapter()

__all__ = ["VllmAdapter", "adapter"]
