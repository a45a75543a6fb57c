"""An output projection of any library whose padding columns return -inf, as polyshard's interface requires."""

from __future__ import annotations

import torch
from torch import nn

from polyshard.core.context import ParallelAxis
from polyshard.core.errors import AdapterError
from polyshard.core.weight_sharding import Segment


class PaddedHead(nn.Module):
    """A wrapper around a column-parallel layer over the padded vocabulary."""

    def __init__(self, layer: nn.Module, vocab_size: int, axis: ParallelAxis) -> None:
        super().__init__()
        self.layer = layer
        start, self.length = Segment(size=vocab_size, pad_multiple=1).local_range(axis.rank, axis.size)
        self.present = max(0, min(vocab_size - start, self.length))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return local logits `[..., padded vocabulary / size]`."""
        output = self.layer(hidden)
        logits = output[0] if isinstance(output, tuple) else output
        if self.present == self.length:
            return logits
        padding = torch.arange(self.length, device=logits.device) >= self.present
        return logits.masked_fill(padding, float("-inf"))


def padded_size(vocab_size: int, axis: ParallelAxis) -> int:
    """Return the number of rows of the padded vocabulary."""
    return Segment(size=vocab_size, pad_multiple=1).padded_size(axis.size)


def tied_weight(embedding: nn.Module) -> nn.Parameter:
    """Return the parameter of an embedding that a head can be tied to."""
    weights = [p for name, p in embedding.named_parameters() if name.rsplit(".", 1)[-1] == "weight"]
    if len(weights) != 1:
        raise AdapterError(
            f"{type(embedding).__name__} cannot be tied to a head: got {len(weights)} weights, expected one"
        )
    return weights[0]
