"""Communication over one group by torch.distributed, and the autograd pairs that parallel layers are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx

from polyshard.adapters.torch.compat import all_gather_flat, reduce_scatter_flat
from polyshard.core.context import FailureGuard, ParallelAxis, no_guard
from polyshard.core.errors import LayoutError

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchCollectives:
    """`Collectives` of one process group. Every call is guarded: its failure names the rank."""

    group: dist.ProcessGroup
    size: int
    name: str
    guard: FailureGuard = no_guard

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Elementwise `sum` or `max` over the group."""
        # A non-contiguous tensor would be reduced in a copy that is thrown away by some libraries: always copy.
        result = tensor.clone(memory_format=torch.contiguous_format)
        with self.guard(f"{self.name} all_reduce"):
            dist.all_reduce(result, op=_OPERATIONS[op], group=self.group)
        return result

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenation along `dim`."""
        source = tensor.contiguous()
        result = source.new_empty((self.size, *source.shape))
        with self.guard(f"{self.name} all_gather"):
            all_gather_flat(result.flatten(0, 1), source, self.group)
        return result.flatten(0, 1) if dim % tensor.dim() == 0 else torch.cat(result.unbind(0), dim=dim)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part, along `dim`, of the sum."""
        source = torch.cat(tensor.chunk(self.size, dim=dim)) if dim % tensor.dim() else tensor.contiguous()
        result = source.new_empty((source.shape[0] // self.size, *source.shape[1:]))
        with self.guard(f"{self.name} reduce_scatter"):
            reduce_scatter_flat(result, source, self.group)
        return result

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[ranks, ...]`, one part for each rank, to `[ranks, ...]`, one part from each."""
        source = tensor.contiguous()
        result = torch.empty_like(source)
        with self.guard(f"{self.name} all_to_all"):
            dist.all_to_all_single(result, source, group=self.group)
        return result

    def rotate(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, of the same shape, of the rank before; this one goes to the rank after."""
        source = tensor.contiguous()
        result = torch.empty_like(source)
        rank = dist.get_rank(self.group)
        after, before = (dist.get_global_rank(self.group, (rank + by) % self.size) for by in (1, -1))
        operations = [
            dist.P2POp(dist.isend, source, after, self.group),
            dist.P2POp(dist.irecv, result, before, self.group),
        ]
        with self.guard(f"{self.name} rotate"):
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return result


def _collectives(axis: ParallelAxis) -> Any:
    assert axis.collectives is not None, f"the {axis.name} axis has several ranks but no collectives"
    return axis.collectives


class _Communicate(torch.autograd.Function):
    """A forward and a backward communication, each a function of the tensor alone."""

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
    """Identity forward, sum over the axis backward: the entry of a tensor-parallel region."""
    if axis.size == 1:
        return tensor
    return _Communicate.apply(tensor, _same, _collectives(axis).all_reduce)


def reduce_from_region(tensor: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Sum over the axis forward, identity backward: the exit of a tensor-parallel region."""
    if axis.size == 1:
        return tensor
    return _Communicate.apply(tensor, _collectives(axis).all_reduce, _same)


def gather_sequence(tensor: torch.Tensor, axis: ParallelAxis, dim: int = -2) -> torch.Tensor:
    """All-gather forward, reduce-scatter backward: entry of a tensor-parallel region under sequence parallel."""
    if axis.size == 1:
        return tensor
    group = _collectives(axis)
    dim = dim % tensor.dim()
    return _Communicate.apply(tensor, lambda t: group.all_gather(t, dim), lambda g: group.reduce_scatter(g, dim))


def scatter_sum_sequence(tensor: torch.Tensor, axis: ParallelAxis, dim: int = -2) -> torch.Tensor:
    """Reduce-scatter forward, all-gather backward: exit of a tensor-parallel region under sequence parallel."""
    if axis.size == 1:
        return tensor
    group = _collectives(axis)
    dim = dim % tensor.dim()
    require_divisible_sequence(tensor, axis, dim)
    return _Communicate.apply(tensor, lambda t: group.reduce_scatter(t, dim), lambda g: group.all_gather(g, dim))


def require_divisible_sequence(tensor: torch.Tensor, axis: ParallelAxis, dim: int) -> None:
    """Raise `LayoutError` where sequence parallel cannot cut the sequence evenly."""
    if tensor.shape[dim] % axis.size:
        raise LayoutError(
            f"sequence parallel: {tensor.shape[dim]} tokens (dimension {dim} of {tuple(tensor.shape)}) cannot be "
            f"divided by tensor-parallel size {axis.size}; pad the sequence to a multiple of it"
        )


def sum_gradient(parameter: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Identity forward; the gradient is summed over the axis.

    For a whole parameter that each rank applies to a part of the activations. Done in autograd, so that the gradient
    is right however it is used afterwards (hooks of DDP and FSDP included).
    """
    return copy_to_region(parameter, axis)


def transform_gradient(parameter: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Identity forward; `transform` is applied to the gradient."""
    return _Communicate.apply(parameter, _same, transform)
