"""Collectives of one process group with torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from polyshard.adapters.torch.compat import all_gather_flat, reduce_scatter_flat
from polyshard.core.context import FailureGuard, no_guard
from polyshard.layers import collective_operators as operators

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchCollectives:
    """`Collectives` of one process group as custom operators; errors of every call name the rank at fault."""

    group: dist.ProcessGroup
    size: int
    name: str
    guard: FailureGuard = no_guard
    _direct: _Direct = field(init=False, repr=False, compare=False)
    _key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        direct = _Direct(group=self.group, size=self.size, name=self.name, guard=self.guard)
        object.__setattr__(self, "_direct", direct)
        object.__setattr__(self, "_key", operators.register_group(direct, self.name))

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return the elementwise `sum` or `max` over the group."""
        return operators.all_reduce(tensor.detach(), self._key, op)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the concatenation along `dim`."""
        return operators.all_gather(tensor.detach(), self._key, dim, self.size)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part, along `dim`, of the sum."""
        return operators.reduce_scatter(tensor.detach(), self._key, dim, self.size)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send part i of `[ranks, ...]` to rank i; return the parts received from each rank, in the same shape."""
        return operators.all_to_all(tensor.detach(), self._key)

    def rotate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send the tensor to the next rank; return the tensor of the previous rank, in the same shape."""
        source = tensor.contiguous()
        if tensor.is_cuda and dist.get_backend(self.group) == "gloo":
            source = source.cpu()  # gloo sends and receives from host memory only
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
        return result.to(tensor.device)


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class _Direct:
    """The communication itself, which the operators run."""

    group: dist.ProcessGroup
    size: int
    name: str
    guard: FailureGuard

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return the elementwise `sum` or `max` over the group."""
        # Always copy: some libraries reduce a non-contiguous tensor in a temporary and discard the result.
        result = tensor.clone(memory_format=torch.contiguous_format)
        with self.guard(f"{self.name} all_reduce"):
            dist.all_reduce(result, op=_OPERATIONS[op], group=self.group)
        return result

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the concatenation along `dim`."""
        source = tensor.contiguous()
        result = source.new_empty((self.size, *source.shape))
        with self.guard(f"{self.name} all_gather"):
            all_gather_flat(result.flatten(0, 1), source, self.group)
        return result.flatten(0, 1) if dim % tensor.dim() == 0 else torch.cat(result.unbind(0), dim=dim)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part, along `dim`, of the sum."""
        source = torch.cat(tensor.chunk(self.size, dim=dim)) if dim % tensor.dim() else tensor.contiguous()
        result = source.new_empty((source.shape[0] // self.size, *source.shape[1:]))
        with self.guard(f"{self.name} reduce_scatter"):
            reduce_scatter_flat(result, source, self.group)
        return result

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send part i of `[ranks, ...]` to rank i; return the parts received from each rank, in the same shape."""
        source = tensor.contiguous()
        result = torch.empty_like(source)
        with self.guard(f"{self.name} all_to_all"):
            dist.all_to_all_single(result, source, group=self.group)
        return result
