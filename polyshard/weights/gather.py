"""Gathering of shards into a full tensor."""

from __future__ import annotations

import torch

from polyshard.core.context import ParallelAxis
from polyshard.core.weight_sharding import WeightLayout


def gather_shards(
    shard: torch.Tensor, layout: WeightLayout, tensor_axis: ParallelAxis, expert_axis: ParallelAxis | None = None
) -> torch.Tensor:
    """Return, on every rank, the full tensor of which each rank of the axes holds a shard.

    This is a collective if the layout is sharded and the axis has more than one rank. Without an expert axis, the
    result has this rank's experts only.

    Examples:
        >>> from polyshard.core.context import ParallelAxis
        >>> layout = ps.WeightLayout(shape=(4, 2), dim=0)
        >>> gather_shards(torch.ones(4, 2), layout, ParallelAxis(name="tensor")).shape
        torch.Size([4, 2])
    """
    if layout.dim is None or tensor_axis.size == 1:
        full = layout.assemble([shard])
    else:
        assert tensor_axis.collectives is not None
        full = layout.assemble(tensor_axis.collectives.all_gather(shard.unsqueeze(0), 0).unbind(0))
    if layout.experts is None or expert_axis is None or expert_axis.size == 1:
        return full
    assert expert_axis.collectives is not None
    return expert_axis.collectives.all_gather(full.contiguous(), 0)
