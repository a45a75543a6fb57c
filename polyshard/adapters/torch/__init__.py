"""torch alone: the executable definition of the protocols. Read it to learn them."""

from polyshard.adapters.torch.adapter import TorchAdapter

adapter = TorchAdapter()

__all__ = ["TorchAdapter", "adapter"]
