"""The sum of a row-parallel layer's partial products, in the same order at every tensor-parallel size.

A reduction of the communication backend adds ranks in its own order, and a rank with two shards would add them inside
its matmul. Here all partial products are gathered, added one by one in float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyshard.core.context import ParallelAxis


def sum_in_order(parts: Sequence[torch.Tensor], axis: ParallelAxis, scattered: bool) -> torch.Tensor:
    """Return the sum of all ranks' partial products; differentiable.

    Args:
        parts: this rank's partial products, in the order of their input features, each `[..., tokens, out]`.
        axis: the tensor axis, whose ranks have equal numbers of parts.
        scattered: return only this rank's part of the tokens (sequence parallel).

    Returns:
        `[..., tokens, out]`, or `[..., tokens / size, out]`.
    """
    return _SumInOrder.apply(axis, scattered, *parts)


class _SumInOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: ParallelAxis, scattered: bool, *parts: torch.Tensor) -> torch.Tensor:
        ctx.axis, ctx.scattered, ctx.count = axis, scattered, len(parts)
        stacked = torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)
        if axis.size > 1:
            assert axis.collectives is not None
            stacked = axis.collectives.all_gather(stacked, 0)
            if scattered:
                length = stacked.shape[-2] // axis.size
                stacked = stacked.narrow(-2, axis.rank * length, length)
        if stacked.shape[0] == 1:
            return stacked[0]
        total = stacked[0].float()
        for part in stacked[1:]:
            total = total + part.float()
        return total.to(stacked.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        if ctx.scattered and ctx.axis.size > 1:
            gradient = ctx.axis.collectives.all_gather(gradient, gradient.dim() - 2)
        return None, None, *(gradient for _ in range(ctx.count))
