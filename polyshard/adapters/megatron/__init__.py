"""Megatron-Core: its layers, DistributedDataParallel and optimizers. Importing this imports no Megatron."""

from polyshard.adapters.megatron.adapter import MegatronAdapter

adapter = MegatronAdapter()

__all__ = ["MegatronAdapter", "adapter"]
