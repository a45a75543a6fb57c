"""FairScale: its model-parallel layers, OSS and ShardedDataParallel. Importing this package imports no FairScale."""

from polyshard.adapters.fairscale.adapter import FairscaleAdapter

adapter = FairscaleAdapter()

__all__ = ["FairscaleAdapter", "adapter"]
