"""How many ranks stand along each axis of parallelism, and where a rank stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from polyshard.core.errors import LayoutError

Axis = Literal["tensor", "pipeline", "data", "context", "expert", "replica"]
AXES: tuple[Axis, ...] = get_args(Axis)
SIZED: tuple[Axis, ...] = ("tensor", "pipeline", "data", "context", "expert")  # those that a layout names

# Fastest varying first, as Megatron-Core's default order "tp-cp-ep-dp-pp": ranks of one tensor-parallel group
# are neighbours. Expert parallelism lies over the data axis and has no axis of its own here.
RANK_ORDER: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Sizes of all axes.

    Attributes:
        tensor: ranks that share each layer's weights.
        pipeline: stages.
        data: model replicas that see different tokens.
        context: ranks that share one sequence.
        expert: ranks of the data axis over which experts are spread; divides `data`.
        sequence_parallel: shard activations over the tensor axis along the sequence between parallel regions.

    Raises:
        LayoutError: a size is not a positive integer, or `expert` does not divide `data`.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for axis in SIZED:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise LayoutError(f"{axis} parallel size must be a positive integer, got {size!r}")
        if self.data % self.expert:
            raise LayoutError(f"expert parallel size {self.expert} must divide the data parallel size {self.data}")

    @classmethod
    def for_world(
        cls,
        world_size: int,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        context: int = 1,
        expert: int = 1,
        sequence_parallel: bool = False,
    ) -> ParallelLayout:
        """The layout whose data axis takes all the ranks that the other axes leave.

        Raises:
            LayoutError: the other sizes do not divide `world_size`.
        """
        probe = cls(tensor=tensor, pipeline=pipeline, context=context, sequence_parallel=sequence_parallel)
        rest, remainder = divmod(world_size, probe.world_size)
        if remainder or not rest:
            raise LayoutError(
                f"world size {world_size} is not a multiple of {probe._arithmetic()}: "
                f"start a multiple of {probe.world_size} processes, or change a size"
            )
        return cls(
            tensor=tensor,
            pipeline=pipeline,
            data=rest,
            context=context,
            expert=expert,
            sequence_parallel=sequence_parallel,
        )

    @property
    def world_size(self) -> int:
        """Ranks that this layout needs."""
        return self.tensor * self.pipeline * self.data * self.context

    def validate(self, world_size: int) -> None:
        """Raise `LayoutError`, with the arithmetic, where this layout does not fill `world_size` ranks."""
        if self.world_size != world_size:
            raise LayoutError(
                f"this layout needs {self._arithmetic(with_data=True)} ranks, but the world has {world_size}: "
                f"start {self.world_size} processes (torchrun --nproc-per-node), or change a size"
            )

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Position of a global rank along each axis of `RANK_ORDER`, and along `expert`."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside this layout's {self.world_size} ranks")
        position: dict[Axis, int] = {}
        rest = rank
        for axis in RANK_ORDER:
            rest, position[axis] = divmod(rest, getattr(self, axis))
        position["expert"] = position["data"] % self.expert
        return position

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """All groups of an axis: global ranks that differ in that coordinate alone, in coordinate order.

        The replica axis is the data and the context axis together: the ranks that hold the same weights.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self.coordinates(rank)
            if axis == "expert":
                others = [position[a] for a in RANK_ORDER if a != "data"]
                others.append(position["data"] // self.expert)
            elif axis == "replica":
                others = [position[a] for a in RANK_ORDER if a not in ("data", "context")]
            else:
                others = [position[a] for a in RANK_ORDER if a != axis]
            members.setdefault(tuple(others), []).append(rank)
        return [tuple(ranks) for ranks in members.values()]

    def _arithmetic(self, with_data: bool = False) -> str:
        sizes = [
            (axis, getattr(self, axis))
            for axis in ("tensor", "pipeline", "context", "data")
            if axis != "data" or with_data
        ]
        product = 1
        for _, size in sizes:
            product *= size
        return " x ".join(f"{axis} {size}" for axis, size in sizes) + f" = {product}"
