"""A layer with low-rank matrices beside it, at every tensor-parallel and sequence-parallel size.

    column-parallel  h = A x, with A replicated; y_i += B_i h_i, with the rows of B_i sharded as those of segment i.
                     Backward: the gradient of h is summed over the tensor axis, so that of A is complete on each rank.
    row-parallel     h = the sum over the tensor axis of A x, with the columns of A sharded; y += B h, B replicated.

Communication is of `[tokens, r]` and not of the layer's input or output. Under sequence parallel, a column-parallel
layer gathers h, and a row-parallel one scatters it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.context import ParallelContext
from polyshard.core.weight_sharding import Segment, WeightLayout
from polyshard.layers.differentiable import (
    copy_to_region,
    gather_sequence,
    reduce_from_region,
    scatter_sum_sequence,
    sum_gradient,
    transform_gradient,
)
from polyshard.layers.replica_gradients import sum_replicas
from polyshard.training.dropout import Dropout

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPart:
    """The pair of matrices of one projection of a layer.

    Attributes:
        name: name of the projection in a checkpoint, as Hugging Face has it.
        index: of the projection in its layer; 0 for a layer that is not fused.
        a: layout of A, `[r, in]`.
        b: layout of B, `[out, r]`.
        scale: factor of `B A x`.
    """

    name: str
    index: int
    a: WeightLayout
    b: WeightLayout
    scale: float

    @property
    def key(self) -> str:
        """The name within the layer."""
        return self.name.rpartition(".")[2]


class LoraMatrix(nn.Module):
    """One low-rank matrix. It is a module of its own because ZeRO-3 gathers a weight when its module is called."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=trained)

    def forward(self, x: torch.Tensor, change: Change | None = None) -> torch.Tensor:
        """Return `x Wᵀ`, in the dtype of the weight unless autocast chooses one; `change` is applied to the weight."""
        weight = self.weight if change is None else change(self.weight)
        return F.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype), weight)


class LoraLinear(nn.Module):
    """A frozen layer and low-rank matrices beside it: `layer(x) + scale * B A dropout(x)`.

    Args:
        base_layer: what `polyshard.column_parallel` and related functions return, or `nn.Linear`.
        layout: of its weight.
        parts: the projections of the layer that get matrices.
        dropout: probability of dropping an element of the input of A; one mask for all parts.
        dtype: of the matrices.
        trained: whether the matrices are trained.
        context: the parallel context that the layer was built with.

    Attributes:
        enabled: False leaves the matrices out; see `polyshard.lora_disabled`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        layout: WeightLayout,
        parts: Sequence[LoraPart],
        *,
        dropout: float,
        dtype: torch.dtype,
        trained: bool,
        context: ParallelContext,
    ) -> None:
        super().__init__()
        self.base_layer, self.layout, self.parts = base_layer, layout, tuple(parts)
        self.axis = context.axis("tensor")
        self.sequence_parallel = context.layout.sequence_parallel and self.axis.size > 1
        self.enabled = True
        rank, size, device = self.axis.rank, self.axis.size, context.device

        def matrices(kind: Literal["a", "b"]) -> nn.ModuleDict:
            shapes = {part.key: getattr(part, kind).local_shape(rank, size) for part in self.parts}
            return nn.ModuleDict({key: LoraMatrix(shape, dtype, device, trained) for key, shape in shapes.items()})

        self.lora_A, self.lora_B = matrices("a"), matrices("b")
        self.dropout = Dropout(dropout, context, region="parallel" if layout.dim == 1 else "residual")
        self._sizes = [sum(s.local_range(rank, size)[1] for s in segments) for segments in projections(layout)]
        if layout.dim != 0:
            self._sizes = [layout.shape[0]]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output, in its shape and dtype."""
        y = self.base_layer(x, *args, **kwargs)
        if not self.enabled:
            return y
        x = self.dropout(x)
        added = self._of_row(x) if self.layout.dim == 1 else self._of_column(x)
        if len(added) == len(self._sizes):
            return (y + torch.cat([added[index] for index in sorted(added)], dim=-1)).to(y.dtype)
        parts = [p + added[i] if i in added else p for i, p in enumerate(y.split(self._sizes, dim=-1))]
        return torch.cat([part.to(y.dtype) for part in parts], dim=-1)

    def product(self, matrices: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return `scale * B A` for this rank's shard of the layer's weight, in its shape, in float32 or wider.

        Args:
            matrices: this rank's shards, by their names in this module.
        """
        by_index: dict[int, torch.Tensor] = {}
        for part in self.parts:
            a, b = matrices[f"lora_A.{part.key}.weight"], matrices[f"lora_B.{part.key}.weight"]
            wide = torch.promote_types(a.dtype, torch.float32)
            by_index[part.index] = (b.to(wide) @ a.to(wide)) * part.scale
        like = next(iter(by_index.values()))
        rows = [by_index.get(i, like.new_zeros(size, like.shape[1])) for i, size in enumerate(self._sizes)]
        return torch.cat(rows)

    def _of_column(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return what is added to each segment; of a replicated layer, too, which needs no communication."""
        sharded = self.layout.dim == 0
        change = self._sum_over_ranks if sharded and self.sequence_parallel else None
        hidden = [self.lora_A[part.key](x, change) for part in self.parts]
        if sharded:  # one communication for all parts
            together = torch.cat(hidden, dim=-1)
            enter = gather_sequence if self.sequence_parallel else copy_to_region
            hidden = list(enter(together, self.axis).split([part.a.shape[0] for part in self.parts], dim=-1))
        added = {}
        for part, h in zip(self.parts, hidden):
            shared = part.b.has_replicas(self.axis.size) and torch.is_grad_enabled()
            added[part.index] = self.lora_B[part.key](h, self._over_replicas(part) if shared else None) * part.scale
        return added

    def _of_row(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        (part,) = self.parts
        hidden = self.lora_A[part.key](x)
        if self.sequence_parallel:
            hidden = scatter_sum_sequence(hidden, self.axis)
            return {0: self.lora_B[part.key](hidden, self._sum_over_ranks) * part.scale}
        return {0: self.lora_B[part.key](reduce_from_region(hidden, self.axis)) * part.scale}

    def _sum_over_ranks(self, weight: torch.Tensor) -> torch.Tensor:
        return sum_gradient(weight, self.axis)

    def _over_replicas(self, part: LoraPart) -> Change:
        return lambda weight: transform_gradient(weight, lambda gradient: sum_replicas(gradient, part.b, self.axis))

    def extra_repr(self) -> str:
        """Return the projections and their ranks."""
        return ", ".join(f"{part.key} r={part.a.shape[0]}" for part in self.parts)


def projections(layout: WeightLayout) -> list[tuple[Segment, ...]]:
    """Return the segments of each projection of a column-parallel layer, as a checkpoint stores them.

    Examples:
        >>> gate_up = (ps.Segment(size=4, name="gate_proj"), ps.Segment(size=4, name="up_proj"))
        >>> len(projections(ps.WeightLayout(shape=(8, 3), dim=0, segments=gate_up)))
        2
    """
    if any(segment.name for segment in layout.segments):
        return [(segment,) for segment in layout.segments]
    return [layout.segments]


def lora_part(name: str, index: int, layout: WeightLayout, r: int, scale: float) -> LoraPart:
    """Return the part of one projection of a layer.

    Args:
        name: of the projection in a checkpoint.
        index: of the projection in the layer.
        layout: of the layer's weight.
        r: rank of the matrices.
        scale: factor of `B A x`.
    """
    out, columns = layout.shape
    a, b = WeightLayout(shape=(r, columns)), WeightLayout(shape=(out, r))
    if layout.dim == 1:
        a = WeightLayout(shape=(r, columns), dim=1, segments=layout.segments)
    elif layout.dim == 0:
        plain = tuple(replace(segment, name=None) for segment in projections(layout)[index])
        b = WeightLayout(shape=(sum(segment.size for segment in plain), r), dim=0, segments=plain)
    return LoraPart(name=name, index=index, a=a, b=b, scale=scale)
