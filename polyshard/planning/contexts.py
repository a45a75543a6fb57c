"""Parallel contexts of any size in one process, on the meta device, whose collectives return shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from polyshard.core.context import GroupContext, ParallelAxis
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import LayoutError
from polyshard.core.parallel_layout import Axis, ParallelLayout
from polyshard.layers import collective_operators as operators
from polyshard.native.custom_operator import bare_operator


def _not_on_meta(*_: Any) -> Any:
    raise LayoutError("a planned context communicates shapes: got a tensor with memory, expected one on meta.")


ROTATE = bare_operator("planned_rotate(Tensor x, str group) -> Tensor", _not_on_meta, lambda x, _: torch.empty_like(x))


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class PlannedCollectives:
    """The `Collectives` of an axis that has no other ranks: operators that a `Recorder` counts."""

    name: str
    size: int
    _key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_key", operators.register_group(self, self.name))

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return a tensor in the shape of the sum or maximum."""
        return operators.all_reduce(tensor.detach(), self._key, op)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return a tensor in the shape of the concatenation along `dim`."""
        return operators.all_gather(tensor.detach(), self._key, dim, self.size)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return a tensor in the shape of this rank's part, along `dim`, of the sum."""
        return operators.reduce_scatter(tensor.detach(), self._key, dim, self.size)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in the shape of `tensor`, `[ranks, ...]`."""
        return operators.all_to_all(tensor.detach(), self._key)

    def rotate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in the shape of that of the previous rank."""
        return ROTATE(tensor.contiguous(), self._key)


def axis_of_key(key: str) -> str:
    """Return the name of the axis whose collectives have an operator's group key."""
    return key.rpartition("-")[0]


def planned_context(layout: ParallelLayout, stage: int = 0) -> GroupContext:
    """Return the context of the first rank of a pipeline stage, on the meta device.

    Args:
        layout: of any size.
        stage: the pipeline stage.

    Examples:
        >>> context = planned_context(ParallelLayout(tensor=8, data=128))
        >>> layer = ps.column_parallel(64, 256, context)
        >>> layer.weight.shape, layer(torch.empty(3, 64, device="meta")).shape
        (torch.Size([32, 64]), torch.Size([3, 32]))
    """
    each = layout.tensor * layout.context * layout.data
    first = stage * each
    steps: dict[Axis, tuple[int, int]] = {  # size, and distance of neighbours
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        "data": (layout.data, layout.tensor * layout.context),
        "replica": (layout.data * layout.context, layout.tensor),
        "expert": (layout.expert, layout.tensor * layout.context),
        "pipeline": (layout.pipeline, each),
    }
    axes = {}
    for name, (size, step) in steps.items():
        start, rank = (0, stage) if name == "pipeline" else (first, 0)
        axes[name] = ParallelAxis(
            name=name,
            ranks=tuple(range(start, start + size * step, step)),
            rank=rank,
            collectives=PlannedCollectives(name=name, size=size) if size > 1 else None,
        )
    linear = load_adapter("torch").linear
    return GroupContext(layout=layout, device=torch.device("meta"), linear=linear, axes=axes, rank=first)


def span_of(layout: ParallelLayout, axis: str) -> int:
    """Return the number of neighbouring ranks within which a group of an axis lies."""
    inner = {"tensor": 1, "context": layout.tensor, "pipeline": layout.tensor * layout.context * layout.data}
    sizes = {"replica": layout.data * layout.context, "expert": layout.expert}
    distance = layout.tensor if axis == "replica" else inner.get(axis, layout.tensor * layout.context)
    return sizes.get(axis, getattr(layout, axis, 1)) * distance
