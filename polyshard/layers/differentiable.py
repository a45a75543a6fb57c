"""Autograd functions that communicate: each pairs a communication in forward with the corresponding one in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from polyshard.core.context import ParallelAxis
from polyshard.core.errors import LayoutError


def _collectives(axis: ParallelAxis) -> Any:
    assert axis.collectives is not None, f"the {axis.name} axis has several ranks but no collectives"
    return axis.collectives


class _Communicate(torch.autograd.Function):
    """An autograd function with one communication in forward and one in backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        tensor: torch.Tensor,
        forward: Callable[[torch.Tensor], torch.Tensor],
        backward: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.communicate_backward = backward  # pyrefly: ignore  # torch documents attributes on ctx
        return forward(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.communicate_backward(gradients[0]), None, None


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view_as(tensor)


def copy_to_region(tensor: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Return the tensor, and sum its gradient over the axis: the entry of a tensor-parallel region."""
    if axis.size == 1:
        return tensor
    return _Communicate.apply(tensor, _same, _collectives(axis).all_reduce)


def reduce_from_region(tensor: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Return the sum over the axis, and pass the gradient through: the exit of a tensor-parallel region."""
    if axis.size == 1:
        return tensor
    return _Communicate.apply(tensor, _collectives(axis).all_reduce, _same)


def gather_sequence(tensor: torch.Tensor, axis: ParallelAxis, dim: int = -2) -> torch.Tensor:
    """All-gather forward, reduce-scatter backward: the entry of a tensor-parallel region under sequence parallel."""
    if axis.size == 1:
        return tensor
    group = _collectives(axis)
    dim = dim % tensor.dim()
    return _Communicate.apply(tensor, lambda t: group.all_gather(t, dim), lambda g: group.reduce_scatter(g, dim))


def scatter_sum_sequence(tensor: torch.Tensor, axis: ParallelAxis, dim: int = -2) -> torch.Tensor:
    """Reduce-scatter forward, all-gather backward: the exit of a tensor-parallel region under sequence parallel."""
    if axis.size == 1:
        return tensor
    group = _collectives(axis)
    dim = dim % tensor.dim()
    require_divisible_sequence(tensor, axis, dim)
    return _Communicate.apply(tensor, lambda t: group.reduce_scatter(t, dim), lambda g: group.all_gather(g, dim))


def gather_last(tensor: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """All-gather along the last dimension forward; return this rank's part of the replicated gradient backward."""
    if axis.size == 1:
        return tensor
    group, length = _collectives(axis), tensor.shape[-1]
    return _Communicate.apply(
        tensor,
        lambda t: group.all_gather(t, t.dim() - 1),
        lambda g: g.narrow(-1, axis.rank * length, length).contiguous(),
    )


def require_divisible_sequence(tensor: torch.Tensor, axis: ParallelAxis, dim: int) -> None:
    """Raise `LayoutError` if sequence parallel cannot divide the sequence evenly."""
    if tensor.shape[dim] % axis.size:
        raise LayoutError(
            f"sequence parallel: {tensor.shape[dim]} tokens (dimension {dim} of {tuple(tensor.shape)}) cannot be "
            f"divided by tensor-parallel size {axis.size}. Pad the sequence to a multiple of it."
        )


def sum_gradient(parameter: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Return the parameter, and sum its gradient over the axis.

    Use it for a replicated parameter that each rank applies to a part of the activations. The sum is part of autograd,
    so the gradient is correct for every later use, including the hooks of DDP and FSDP.
    """
    return copy_to_region(parameter, axis)


def transform_gradient(parameter: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the parameter, and apply `transform` to its gradient."""
    return _Communicate.apply(parameter, _same, transform)
