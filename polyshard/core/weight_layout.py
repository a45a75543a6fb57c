"""How one parameter is cut over the tensor-parallel group: the data from which all weight movement derives.

A `WeightLayout` describes the logical (full) tensor. Along at most one dimension it consists of segments, each
sharded on its own: `q | k | v`, `gate | up`. From it follow the slice that a rank holds, the full tensor from all
shards, the names and parts in a Hugging Face file, and the loading into a serving engine's fused layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from polyshard.core.errors import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run along the sharded dimension that is cut evenly over the tensor-parallel ranks.

    Attributes:
        size: logical length.
        unit: indivisible block, such as the head dimension; shards are whole units.
        name: module name of this part in a checkpoint (`q_proj`), where it is stored apart; else None.
        replicate: more ranks than units is allowed; each unit is then held by `tensor / units` neighbouring ranks.
        pad_multiple: where not 0, the length is padded to a multiple of this and of the tensor size.
    """

    size: int
    unit: int = 1
    name: str | None = None
    replicate: bool = False
    pad_multiple: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.unit < 1 or self.size % self.unit:
            raise LayoutError(f"a segment of {self.size} is not made of whole units of {self.unit}")

    @property
    def units(self) -> int:
        """Number of indivisible blocks."""
        return self.size // self.unit

    def padded_size(self, tensor_size: int) -> int:
        """Length with padding."""
        if not self.pad_multiple:
            return self.size
        multiple = math.lcm(self.pad_multiple, tensor_size) * self.unit
        return -(-self.size // multiple) * multiple

    def replicas(self, tensor_size: int) -> int:
        """How many ranks hold the same part."""
        return tensor_size // self.units if self.replicate and tensor_size > self.units else 1

    def local_range(self, rank: int, tensor_size: int) -> tuple[int, int]:
        """Start and length of a rank's part, in the padded segment.

        Raises:
            LayoutError: the units do not divide over the ranks.
        """
        units = self.padded_size(tensor_size) // self.unit
        if units % tensor_size == 0:
            per_rank = units // tensor_size
            return rank * per_rank * self.unit, per_rank * self.unit
        if self.replicate and tensor_size % units == 0:
            return rank // (tensor_size // units) * self.unit, self.unit
        what = f"{self.name}: " if self.name else ""
        blocks = f"{units} blocks of {self.unit}" if self.unit > 1 else f"{units}"
        raise LayoutError(
            f"{what}{blocks} cannot be divided by tensor-parallel size {tensor_size}"
            + (f", nor can {tensor_size} ranks share {units} evenly" if self.replicate else "")
            + f": use a tensor-parallel size that divides {units}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLayout:
    """The logical shape of a parameter and how it is cut.

    Attributes:
        shape: logical shape, without padding or replication.
        dim: the sharded dimension, or None where every rank holds the whole.
        segments: parts along `dim`, in order; their sizes add up to `shape[dim]`.
        gradient: `"partial"` where each tensor-parallel rank's gradient is a partial sum that the training
            engine has to add up (a norm under sequence parallel in a library that leaves this to its engine).
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[Segment, ...] = field(default=())
    gradient: str = "complete"

    def __post_init__(self) -> None:
        if self.gradient not in ("complete", "partial"):
            raise LayoutError(f"gradient must be 'complete' or 'partial', got {self.gradient!r}")
        if self.dim is None:
            if self.segments:
                raise LayoutError("a weight that is not sharded has no segments")
            return
        if not 0 <= self.dim < len(self.shape):
            raise LayoutError(f"dimension {self.dim} is outside shape {self.shape}")
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(size=self.shape[self.dim]),))
        total = sum(segment.size for segment in self.segments)
        if total != self.shape[self.dim]:
            raise LayoutError(f"segments add up to {total}, but dimension {self.dim} of {self.shape} is not that")

    def local_shape(self, rank: int, tensor_size: int) -> tuple[int, ...]:
        """Shape of a rank's shard."""
        if self.dim is None:
            return self.shape
        local = sum(segment.local_range(rank, tensor_size)[1] for segment in self.segments)
        return (*self.shape[: self.dim], local, *self.shape[self.dim + 1 :])

    def segment_shape(self, index: int) -> tuple[int, ...]:
        """Logical shape of one segment's full tensor."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.segments[index].size, *self.shape[self.dim + 1 :])

    def local_offset(self, index: int, rank: int, tensor_size: int) -> tuple[int, int]:
        """Start and length of segment `index` inside a rank's shard, along `dim`."""
        lengths = [segment.local_range(rank, tensor_size)[1] for segment in self.segments[: index + 1]]
        return sum(lengths[:-1]), lengths[-1]

    def slice_segment(self, full: torch.Tensor, index: int, rank: int, tensor_size: int) -> torch.Tensor:
        """A rank's part of one segment's full tensor, zero-padded where the layout pads. May be a view."""
        if tuple(full.shape) != self.segment_shape(index):
            raise LayoutError(f"expected a full tensor of shape {self.segment_shape(index)}, got {tuple(full.shape)}")
        if self.dim is None:
            return full
        segment = self.segments[index]
        start, length = segment.local_range(rank, tensor_size)
        present = max(0, min(segment.size - start, length))
        part = full.narrow(self.dim, min(start, segment.size), present)
        if present == length:
            return part
        padding = list(full.shape)
        padding[self.dim] = length - present
        return torch.cat([part, full.new_zeros(padding)], dim=self.dim)

    def slice(self, full: torch.Tensor, rank: int, tensor_size: int) -> torch.Tensor:
        """A rank's shard of the full tensor (all segments, in order). May be a view of `full`."""
        if tuple(full.shape) != self.shape:
            raise LayoutError(f"expected a full tensor of shape {self.shape}, got {tuple(full.shape)}")
        if self.dim is None:
            return full
        parts = full.split([segment.size for segment in self.segments], dim=self.dim)
        shards = [self.slice_segment(part, i, rank, tensor_size) for i, part in enumerate(parts)]
        return shards[0] if len(shards) == 1 else torch.cat(shards, dim=self.dim)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """The full tensor's segments, as views."""
        if self.dim is None:
            return [full]
        return list(full.split([segment.size for segment in self.segments], dim=self.dim))

    def assemble(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from the shards of all ranks, in rank order; padding and replicas are dropped."""
        if self.dim is None:
            return shards[0]
        tensor_size = len(shards)
        parts: list[torch.Tensor] = []
        for index, segment in enumerate(self.segments):
            step = segment.replicas(tensor_size)
            pieces = []
            for rank in range(0, tensor_size, step):
                start, length = self.local_offset(index, rank, tensor_size)
                pieces.append(shards[rank].narrow(self.dim, start, length))
            joined = torch.cat(pieces, dim=self.dim)
            parts.append(joined.narrow(self.dim, 0, segment.size))
        return torch.cat(parts, dim=self.dim)

    def has_replicas(self, tensor_size: int) -> bool:
        """Whether some segment is held by more than one rank."""
        return any(segment.replicas(tensor_size) > 1 for segment in self.segments)


def replicated(shape: Sequence[int]) -> WeightLayout:
    """The layout of a parameter that every rank holds whole."""
    return WeightLayout(shape=tuple(shape))


def qkv_segments(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    names: Sequence[str | None] = (None, None, None),
) -> tuple[Segment, Segment, Segment]:
    """Of a fused query, key and value projection: cut by heads, key and value heads shared where they are few."""
    q_name, k_name, v_name = names
    value_dim = head_dim if value_dim is None else value_dim
    return (
        Segment(size=num_heads * head_dim, unit=head_dim, name=q_name),
        Segment(size=num_kv_heads * head_dim, unit=head_dim, name=k_name, replicate=True),
        Segment(size=num_kv_heads * value_dim, unit=value_dim, name=v_name, replicate=True),
    )
