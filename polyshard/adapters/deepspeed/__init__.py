"""DeepSpeed: its automatic tensor parallelism's layers and its ZeRO engine. Importing this imports no DeepSpeed."""

from polyshard.adapters.deepspeed.adapter import DeepspeedAdapter

adapter = DeepspeedAdapter()

__all__ = ["DeepspeedAdapter", "adapter"]
