"""Collectives as custom operators: torch.compile does not trace into them, and selective recomputation can keep them.

An operator's arguments are plain values, so a group is passed by a key. Whatever surrounds the communication, such as
the failure guard, stays inside the operator. The ranks of a group compile equal graphs of equal shapes, so that
generated code calls the operators in one order on all of them.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from polyshard.core.context import Collectives
from polyshard.native.custom_operator import bare_operator


class GroupCollectives(Collectives, Protocol):
    """The collectives of one process group that the operators run."""

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send part i of `[ranks, ...]` to rank i; return the parts received from each rank, in the same shape."""
        ...


_groups: WeakValueDictionary[str, GroupCollectives] = WeakValueDictionary()
_numbers = itertools.count()


def register_group(collectives: GroupCollectives, name: str) -> str:
    """Return a key under which the operators find the collectives for as long as the caller keeps them alive.

    Keys are equal on all ranks that create their groups in the same order.
    """
    key = f"{name}-{next(_numbers)}"
    _groups[key] = collectives
    return key


def _all_reduce(x: torch.Tensor, group: str, op: str) -> torch.Tensor:
    return _groups[group].all_reduce(x, op)


def _all_gather(x: torch.Tensor, group: str, dim: int, size: int) -> torch.Tensor:
    del size
    return _groups[group].all_gather(x, dim).contiguous()


def _reduce_scatter(x: torch.Tensor, group: str, dim: int, size: int) -> torch.Tensor:
    del size
    return _groups[group].reduce_scatter(x, dim)


def _all_to_all(x: torch.Tensor, group: str) -> torch.Tensor:
    return _groups[group].all_to_all(x)


def _same_shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _gathered(x: torch.Tensor, group: str, dim: int, size: int) -> torch.Tensor:
    del group
    shape = list(x.shape)
    shape[dim] *= size
    return x.new_empty(shape)


def _scattered(x: torch.Tensor, group: str, dim: int, size: int) -> torch.Tensor:
    del group
    shape = list(x.shape)
    shape[dim] //= size
    return x.new_empty(shape)


_KEY = "CompositeExplicitAutograd"  # any device
all_reduce = bare_operator("all_reduce(Tensor x, str group, str op) -> Tensor", _all_reduce, _same_shape, _KEY)
all_gather = bare_operator("all_gather(Tensor x, str group, int dim, int size) -> Tensor", _all_gather, _gathered, _KEY)
reduce_scatter = bare_operator(
    "reduce_scatter(Tensor x, str group, int dim, int size) -> Tensor", _reduce_scatter, _scattered, _KEY
)
all_to_all = bare_operator("all_to_all(Tensor x, str group) -> Tensor", _all_to_all, _same_shape, _KEY)

OPERATORS = (all_reduce, all_gather, reduce_scatter, all_to_all)
