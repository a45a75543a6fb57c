"""From a rank's shard to the full tensor."""

from __future__ import annotations

import torch

from polyshard.core.context import ParallelAxis
from polyshard.core.weight_layout import WeightLayout


def gather_shards(shard: torch.Tensor, layout: WeightLayout, tensor_axis: ParallelAxis) -> torch.Tensor:
    """The full tensor of which each rank of the axis holds a shard; on every rank.

    A collective where the layout is sharded and the axis has several ranks.
    """
    if layout.dim is None or tensor_axis.size == 1:
        return layout.assemble([shard])
    assert tensor_axis.collectives is not None
    return layout.assemble(tensor_axis.collectives.all_gather(shard.unsqueeze(0), 0).unbind(0))
