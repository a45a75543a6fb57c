"""FairScale: its model-parallel layers, OSS and ShardedDataParallel. Importing this does not import FairScale."""

from polyshard.adapters.fairscale.adapter import FairscaleAdapter

adapter = FairscaleAdapter()

__all__ = ["FairscaleAdapter", "adapter"]
