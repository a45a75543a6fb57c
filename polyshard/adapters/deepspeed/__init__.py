"""DeepSpeed: the layers of its automatic tensor parallelism, and ZeRO. Importing this does not import DeepSpeed."""

from polyshard.adapters.deepspeed.adapter import DeepspeedAdapter

adapter = DeepspeedAdapter()

__all__ = ["DeepspeedAdapter", "adapter"]
