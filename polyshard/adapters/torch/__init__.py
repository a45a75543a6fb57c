"""The adapter of plain torch, which is the reference implementation of the protocols."""

from polyshard.adapters.torch.adapter import TorchAdapter

adapter = TorchAdapter()

__all__ = ["TorchAdapter", "adapter"]
