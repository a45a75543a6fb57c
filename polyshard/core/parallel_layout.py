"""The parallel layout: the size of every axis of parallelism, and the position of each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from polyshard.core.errors import LayoutError

Axis = Literal["tensor", "pipeline", "data", "context", "expert", "replica", "expert_replica"]
AXES: tuple[Axis, ...] = get_args(Axis)
LAYOUT_AXES: tuple[Axis, ...] = ("tensor", "pipeline", "data", "context", "expert")  # the fields of a layout

# Fastest varying first, as Megatron-Core's default order "tp-cp-ep-dp-pp": the ranks of a tensor-parallel group are
# neighbours. The expert axis is a part of the data axis and therefore does not appear.
RANK_ORDER: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """The sizes of all axes.

    Attributes:
        tensor: number of ranks over which each layer's weights are sharded.
        pipeline: number of pipeline stages.
        data: number of model replicas that process different tokens.
        context: number of ranks that share one sequence.
        expert: number of ranks of the data axis over which experts are distributed; must divide `data`.
        sequence_parallel: shard activations over the tensor axis, along the sequence, between parallel layers.

    Raises:
        LayoutError: a size is not a positive integer, `expert` does not divide `data`, or `sequence_parallel` is no
            bool.

    Examples:
        >>> layout = ParallelLayout(tensor=2, data=2)
        >>> layout.world_size, layout.groups("tensor"), layout.groups("data")
        (4, [(0, 1), (2, 3)], [(0, 2), (1, 3)])
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for axis in LAYOUT_AXES:
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise LayoutError(f"The {axis}-parallel size is invalid: got {size!r}, expected a positive integer.")
        if not isinstance(self.sequence_parallel, bool):
            raise LayoutError(f"sequence_parallel is invalid: got {self.sequence_parallel!r}, expected True or False.")
        if self.data % self.expert:
            raise LayoutError(
                f"The expert-parallel size is invalid: got {self.expert}, expected a divisor of the data-parallel size "
                f"{self.data}."
            )

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
        """Return the layout for `world_size` ranks whose data axis takes all ranks that the other axes leave.

        Raises:
            LayoutError: the product of the other sizes does not divide `world_size`.

        Examples:
            >>> ParallelLayout.for_world(8, tensor=2).data
            4
        """
        probe = cls(tensor=tensor, pipeline=pipeline, context=context, sequence_parallel=sequence_parallel)
        rest, remainder = divmod(world_size, probe.world_size)
        if remainder or not rest:
            raise LayoutError(
                f"The world size does not fit the layout: got {world_size}, expected a multiple of "
                f"{probe._arithmetic()}. Start a multiple of {probe.world_size} processes, or change a size."
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
        """The number of ranks in this layout."""
        return self.tensor * self.pipeline * self.data * self.context

    def validate(self, world_size: int) -> None:
        """Raise `LayoutError`, with the arithmetic, unless this layout has exactly `world_size` ranks."""
        if self.world_size != world_size:
            raise LayoutError(
                f"The world size does not fit the layout: got {world_size} ranks, expected "
                f"{self._arithmetic(with_data=True)}. Start {self.world_size} processes (torchrun --nproc-per-node), "
                "or change a size."
            )

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Return the position of a global rank along each axis of `RANK_ORDER` and along `expert`."""
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"The rank is outside the layout: got {rank}, expected 0 to {self.world_size - 1}.")
        position: dict[Axis, int] = {}
        rest = rank
        for axis in RANK_ORDER:
            rest, position[axis] = divmod(rest, getattr(self, axis))
        position["expert"] = position["data"] % self.expert
        return position

    def groups(self, axis: Axis) -> list[tuple[int, ...]]:
        """Return all groups of an axis: the global ranks that differ only in that coordinate, in coordinate order.

        The replica axis is the data and the context axis together: the ranks that hold the same weights. The
        expert_replica axis is the part of it whose ranks also hold the same experts.
        """
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            position = self.coordinates(rank)
            if axis == "expert":
                others = [position[a] for a in RANK_ORDER if a != "data"]
                others.append(position["data"] // self.expert)
            elif axis in ("replica", "expert_replica"):
                others = [position[a] for a in RANK_ORDER if a not in ("data", "context")]
                if axis == "expert_replica":
                    others.append(position["expert"])
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
