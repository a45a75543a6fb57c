"""Weight layouts: how one parameter is sharded over the tensor axis. All weight movement derives from them.

A `WeightLayout` describes the logical (full) tensor. Along at most one dimension it consists of segments that are
sharded separately: `q | k | v`, `gate | up`. The layout determines each rank's shard, how shards are assembled into
the full tensor, the names and parts in a Hugging Face checkpoint, and the loading into a server's fused layers. The
weights of a mixture of experts have the experts as dimension 0, which the expert axis shards besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from polyshard.core.errors import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a parameter along its sharded dimension that is divided evenly over the tensor-parallel ranks.

    Attributes:
        size: logical length.
        unit: length of an indivisible block, such as the head dimension; shards consist of complete blocks.
        name: module name of this part in a checkpoint (`q_proj`) if it is stored separately; else None.
        replicate: allow more ranks than units; `tensor / units` neighbouring ranks then hold the same unit.
        pad_multiple: if not 0, pad the length to a multiple of this and of the tensor-parallel size.

    Raises:
        LayoutError: `size` is not a positive multiple of `unit`.

    Examples:
        Two KV heads of size 64 over four ranks, two ranks to a head:

        >>> keys = Segment(size=128, unit=64, name="k_proj", replicate=True)
        >>> [keys.local_range(rank, 4) for rank in range(4)]
        [(0, 64), (0, 64), (64, 64), (64, 64)]
    """

    size: int
    unit: int = 1
    name: str | None = None
    replicate: bool = False
    pad_multiple: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.unit < 1 or self.size % self.unit:
            raise LayoutError(f"The segment is invalid: got size {self.size}, expected a multiple of unit {self.unit}.")

    @property
    def units(self) -> int:
        """The number of indivisible blocks."""
        return self.size // self.unit

    def padded_size(self, tensor_size: int) -> int:
        """Return the length with padding."""
        if not self.pad_multiple:
            return self.size
        multiple = math.lcm(self.pad_multiple, tensor_size) * self.unit
        return -(-self.size // multiple) * multiple

    def replicas(self, tensor_size: int) -> int:
        """Return the number of ranks that hold the same part."""
        return tensor_size // self.units if self.replicate and tensor_size > self.units else 1

    def local_range(self, rank: int, tensor_size: int) -> tuple[int, int]:
        """Return start and length of a rank's part of the padded segment.

        Raises:
            LayoutError: the units cannot be divided evenly over the ranks.
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
            + f". Use a tensor-parallel size that divides {units}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRange:
    """The experts that a rank holds, of all experts of a layer.

    Attributes:
        total: number of experts of the layer.
        first: the first one on this rank.
        count: number of experts on this rank.

    Raises:
        LayoutError: the range is not part of the experts, or there are fewer than two experts.

    Examples:
        >>> ExpertRange.of_rank(8, 1, 2)
        ExpertRange(total=8, first=4, count=4)
    """

    total: int
    first: int
    count: int

    def __post_init__(self) -> None:
        if self.total < 2 or self.first < 0 or self.count < 1 or self.first + self.count > self.total:
            raise LayoutError(
                f"The range of experts is invalid: got {self.count} from {self.first} on, of {self.total}, expected a "
                "part of at least two experts."
            )

    @classmethod
    def of_rank(cls, total: int, rank: int, size: int) -> ExpertRange:
        """Return the experts of one rank of an expert axis.

        Raises:
            LayoutError: the experts cannot be divided evenly over the ranks.
        """
        if total % size:
            raise LayoutError(
                f"{total} experts cannot be divided by expert-parallel size {size}. Use an expert-parallel size that "
                f"divides {total}."
            )
        return cls(total=total, first=rank * (total // size), count=total // size)

    def __contains__(self, expert: object) -> bool:
        return isinstance(expert, int) and self.first <= expert < self.first + self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLayout:
    """The logical shape of a parameter and how it is sharded.

    Attributes:
        shape: logical shape, without padding or replication. With `experts`, dimension 0 is the experts.
        dim: the sharded dimension; None if the parameter is replicated.
        segments: parts along `dim`, in order; their sizes must add up to `shape[dim]`. Default: one segment.
        gradient: `"partial"` if each tensor-parallel rank's gradient is a partial sum that the training engine must add
            up (a norm under sequence parallel in a library that leaves this to its engine), else `"complete"`.
        experts: the experts on this rank, for weights of a mixture of experts; else None. It is the only field whose
            value depends on the rank.

    Raises:
        LayoutError: the fields contradict each other.

    Examples:
        A merged gate/up projection with 4 output features each, over two ranks:

        >>> gate_up = (Segment(size=4, name="gate_proj"), Segment(size=4, name="up_proj"))
        >>> layout = WeightLayout(shape=(8, 3), dim=0, segments=gate_up)
        >>> full = torch.arange(24.0).view(8, 3)
        >>> shards = [layout.slice(full, rank, 2) for rank in (0, 1)]
        >>> shards[1][:, 0].tolist()
        [6.0, 9.0, 18.0, 21.0]
        >>> torch.equal(layout.assemble(shards), full)
        True
    """

    shape: tuple[int, ...]
    dim: int | None = None
    segments: tuple[Segment, ...] = field(default=())
    gradient: str = "complete"
    experts: ExpertRange | None = None

    def __post_init__(self) -> None:
        if self.experts is not None and (self.dim == 0 or not self.shape or self.shape[0] != self.experts.total):
            raise LayoutError(
                f"The layout of experts is invalid: got shape {self.shape}, sharded dimension {self.dim} and "
                f"{self.experts.total} experts, expected the experts as dimension 0, sharded by the expert axis only."
            )
        if self.gradient not in ("complete", "partial"):
            raise LayoutError(f"gradient is invalid: got {self.gradient!r}, expected 'complete' or 'partial'.")
        if self.dim is None:
            if self.segments:
                raise LayoutError("The segments are unexpected: a parameter without a sharded dimension has none.")
            return
        if not 0 <= self.dim < len(self.shape):
            raise LayoutError(
                f"The sharded dimension is invalid: got {self.dim}, expected 0 to {len(self.shape) - 1} for shape "
                f"{self.shape}."
            )
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(size=self.shape[self.dim]),))
        total = sum(segment.size for segment in self.segments)
        if total != self.shape[self.dim]:
            raise LayoutError(
                f"The sum of the segments is wrong: got {total}, expected {self.shape[self.dim]}, the size of "
                f"dimension {self.dim} of {self.shape}."
            )

    def local_shape(self, rank: int, tensor_size: int) -> tuple[int, ...]:
        """Return the shape of a rank's shard."""
        if self.experts is not None:
            return self.of_local_experts().local_shape(rank, tensor_size)
        if self.dim is None:
            return self.shape
        local = sum(segment.local_range(rank, tensor_size)[1] for segment in self.segments)
        return (*self.shape[: self.dim], local, *self.shape[self.dim + 1 :])

    def segment_shape(self, index: int) -> tuple[int, ...]:
        """Return the logical shape of one segment's full tensor."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.segments[index].size, *self.shape[self.dim + 1 :])

    def local_offset(self, index: int, rank: int, tensor_size: int) -> tuple[int, int]:
        """Return start and length of segment `index` inside a rank's shard, along `dim`."""
        lengths = [segment.local_range(rank, tensor_size)[1] for segment in self.segments[: index + 1]]
        return sum(lengths[:-1]), lengths[-1]

    def slice_segment(self, full: torch.Tensor, index: int, rank: int, tensor_size: int) -> torch.Tensor:
        """Return a rank's part of one segment's full tensor, with zeros for padding. May be a view of `full`."""
        if tuple(full.shape) != self.segment_shape(index):
            raise LayoutError(
                f"The full tensor has the wrong shape: got {tuple(full.shape)}, expected {self.segment_shape(index)}."
            )
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
        """Return a rank's shard of the full tensor (all segments, in order). May be a view of `full`."""
        if tuple(full.shape) != self.shape:
            raise LayoutError(f"The full tensor has the wrong shape: got {tuple(full.shape)}, expected {self.shape}.")
        if self.experts is not None:
            local = full.narrow(0, self.experts.first, self.experts.count)
            return self.of_local_experts().slice(local, rank, tensor_size)
        if self.dim is None:
            return full
        parts = full.split([segment.size for segment in self.segments], dim=self.dim)
        shards = [self.slice_segment(part, i, rank, tensor_size) for i, part in enumerate(parts)]
        return shards[0] if len(shards) == 1 else torch.cat(shards, dim=self.dim)

    def split(self, full: torch.Tensor) -> list[torch.Tensor]:
        """Split the full tensor into its segments, as views."""
        if self.dim is None:
            return [full]
        return list(full.split([segment.size for segment in self.segments], dim=self.dim))

    def assemble(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """Assemble the full tensor from the shards of all tensor-parallel ranks, in rank order.

        Drops padding and replicas. Of a mixture of experts, the result has the experts of the shards.
        """
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

    def of_local_experts(self) -> WeightLayout:
        """Return the layout of this rank's experts, as one tensor without an expert axis."""
        assert self.experts is not None
        return replace(self, shape=(self.experts.count, *self.shape[1:]), experts=None)

    def of_one_expert(self) -> WeightLayout:
        """Return the layout of one expert's weight."""
        return replace(self, shape=self.shape[1:], dim=None if self.dim is None else self.dim - 1, experts=None)

    def has_replicas(self, tensor_size: int) -> bool:
        """Return whether a part of some segment is held by more than one rank."""
        return any(segment.replicas(tensor_size) > 1 for segment in self.segments)


def replicated(shape: Sequence[int]) -> WeightLayout:
    """Return the layout of a replicated parameter."""
    return WeightLayout(shape=tuple(shape))


def qkv_segments(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    names: Sequence[str | None] = (None, None, None),
) -> tuple[Segment, Segment, Segment]:
    """Return the segments of a fused query, key and value projection, sharded by heads.

    KV heads are replicated if there are fewer of them than ranks.

    Examples:
        >>> [segment.size for segment in qkv_segments(num_heads=8, num_kv_heads=2, head_dim=64)]
        [512, 128, 128]
    """
    q_name, k_name, v_name = names
    value_dim = head_dim if value_dim is None else value_dim
    return (
        Segment(size=num_heads * head_dim, unit=head_dim, name=q_name),
        Segment(size=num_kv_heads * head_dim, unit=head_dim, name=k_name, replicate=True),
        Segment(size=num_kv_heads * value_dim, unit=value_dim, name=v_name, replicate=True),
    )
