"""The sum of a row-parallel layer's partial products, in one order at every tensor-parallel size.

A reduction by the backend adds ranks in an order of its own, and a rank that holds two shards would add them inside its
product. Here all partial products are laid side by side and added one after the other, in float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyshard.core.context import ParallelAxis


def sum_in_order(parts: Sequence[torch.Tensor], axis: ParallelAxis, scattered: bool) -> torch.Tensor:
    """The sum over all ranks' partial products; differentiable.

    Args:
        parts: this rank's, in the order of their input features; each `[..., tokens, out]`.
        axis: the tensor axis; its ranks hold equally many.
        scattered: give this rank's part of the tokens alone (sequence parallel).

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
