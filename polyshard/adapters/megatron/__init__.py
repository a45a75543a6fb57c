"""Megatron-Core: its layers, DistributedDataParallel and optimizers. Importing this does not import Megatron."""

from polyshard.adapters.megatron.adapter import MegatronAdapter

adapter = MegatronAdapter()

__all__ = ["MegatronAdapter", "adapter"]
