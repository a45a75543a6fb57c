"""The vLLM adapter: its parallel layers, its paged attention, and its engine as a server of registered models.

Importing this package does not import vLLM; its submodules do, on first use.
"""

from polyshard.adapters.vllm.adapter import VllmAdapter

adapter = VllmAdapter()

__all__ = ["VllmAdapter", "adapter"]
