"""Gradients of segments that are replicated on several tensor-parallel ranks."""

from __future__ import annotations

import torch

from polyshard.core.context import ParallelAxis
from polyshard.core.weight_sharding import WeightLayout


def sum_replicas(gradient: torch.Tensor, layout: WeightLayout, axis: ParallelAxis) -> torch.Tensor:
    """Return a shard's gradient with each replicated segment summed over the ranks that hold it.

    Args:
        gradient: local gradient of a weight or its bias, sharded along dimension 0 as in `layout`.
        layout: the weight's layout.
        axis: the tensor axis.
    """
    result = gradient.clone()
    for index, segment in enumerate(layout.segments):
        if segment.replicas(axis.size) == 1:
            continue
        start, length = layout.local_offset(index, axis.rank, axis.size)
        first = segment.local_range(axis.rank, axis.size)[0]
        full = gradient.new_zeros((segment.size, *gradient.shape[1:]))
        full.narrow(0, first, length).copy_(gradient.narrow(0, start, length))
        assert axis.collectives is not None
        full = axis.collectives.all_reduce(full)
        result.narrow(0, start, length).copy_(full.narrow(0, first, length))
    return result
