"""Pipeline plans: how layers are divided over stages, which rank holds each stage, and the schedule that runs them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

from polyshard.core.errors import ConfigurationError, LayoutError

Schedule = Literal["gpipe", "1f1b", "interleaved-1f1b", "zero-bubble-v", "dualpipe-v"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

Placement = Literal["loop", "v"]

# The schedule determines the placement: zero-bubble-v on looped stages fails (torchtitan#774).
PLACEMENTS: Mapping[Schedule, Placement] = {
    "gpipe": "loop",
    "1f1b": "loop",
    "interleaved-1f1b": "loop",
    "zero-bubble-v": "v",
    "dualpipe-v": "v",
}
# Schedules that compute the gradients of inputs and of weights at different times.
SPLIT_BACKWARD: frozenset[Schedule] = frozenset({"zero-bubble-v", "dualpipe-v"})
_DEFAULT_STAGES: Mapping[Schedule, int] = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """The layers of each pipeline stage, the rank of each stage, and the schedule; `pipeline_plan` makes one.

    Attributes:
        schedule: the order in which stages compute micro-batches.
        bounds: first layer of each stage, and the number of layers: (0, 5, 12). Empty if the factory divides the layers
            by itself.
        placement: the pipeline rank of each stage: (0, 1), looped (0, 1, 0, 1), or V (0, 1, 1, 0).

    Raises:
        LayoutError: a stage has no layer, or a rank has no stage.

    Examples:
        >>> plan = PipelinePlan(schedule="1f1b", bounds=(0, 5, 12), placement=(0, 1))
        >>> plan.layers(1), plan.stages_of(1)
        ((5, 12), (1,))
    """

    schedule: Schedule
    bounds: tuple[int, ...]
    placement: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bounds and len(self.bounds) != len(self.placement) + 1:
            raise LayoutError(
                f"The bounds of the pipeline plan are invalid: got {len(self.bounds)} for {len(self.placement)} "
                f"stages, expected {len(self.placement) + 1}."
            )
        if any(stop <= start for start, stop in pairwise(self.bounds)) or (self.bounds and self.bounds[0] != 0):
            raise LayoutError(
                f"The bounds of the pipeline plan are invalid: got {self.bounds}, expected 0 and then increasing "
                "numbers, so that each stage has a layer."
            )
        if set(self.placement) != set(range(self.ranks)) or not self.placement:
            raise LayoutError(f"A pipeline rank has no stage: got the placement {self.placement}.")

    @property
    def ranks(self) -> int:
        """The number of pipeline ranks."""
        return max(self.placement, default=-1) + 1

    @property
    def num_stages(self) -> int:
        """The number of stages over all ranks."""
        return len(self.placement)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of the stages that a pipeline rank holds, in increasing order."""
        return tuple(stage for stage, holder in enumerate(self.placement) if holder == rank)

    def layers(self, stage: int) -> tuple[int, int]:
        """Return the first layer of a stage, and one past its last."""
        return self.bounds[stage], self.bounds[stage + 1]

    def divide(self, num_layers: int, stage: int, num_stages: int) -> tuple[int, int]:
        """Return `layers(stage)` after a check of the sizes; the `pipeline_layers` of a stage's context.

        Raises:
            LayoutError: the model has another number of layers than the plan.
        """
        if not self.bounds:
            return even_stages(num_layers, stage, num_stages)
        if num_layers != self.bounds[-1]:
            raise LayoutError(
                f"The pipeline plan does not fit the model: got a plan of {self.bounds[-1]} layers, expected "
                f"{num_layers}. Make it with pipeline_plan({num_layers}, ...)."
            )
        return self.layers(stage)


def pipeline_plan(
    num_layers: int,
    ranks: int,
    *,
    schedule: Schedule = "1f1b",
    stages_per_rank: int | None = None,
    layers: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    ends: tuple[float, float] = (0.0, 0.0),
) -> PipelinePlan:
    """Divide layers over the stages of a pipeline: evenly, by a list, or by measured costs.

    On one rank the plan has one stage, so that the same script runs with and without a pipeline.

    Args:
        num_layers: number of layers of the model.
        ranks: number of pipeline ranks: `context.layout.pipeline`.
        schedule: `"gpipe"` (all forward passes, then all backward passes), `"1f1b"`, `"interleaved-1f1b"`,
            `"zero-bubble-v"` or `"dualpipe-v"`. It also determines which rank holds which stage.
        stages_per_rank: number of stages on each rank: 2 for the V schedules, 2 or more for `"interleaved-1f1b"`
            (default 2), else 1.
        layers: number of layers of each stage, in the order of the stages; by default equal numbers, where the first
            stages have one more.
        costs: time of each layer, in any unit, such as `ps.measure_layers` returns: the largest time of a stage is
            minimized.
        ends: time of the embedding, and of the head with its loss, in the unit of `costs`.

    Raises:
        ConfigurationError: the schedule is unknown or does not take that number of stages, both `layers` and `costs`
            are given, or `ends` is given without `costs`.
        LayoutError: there are fewer layers than stages, a number is no positive integer, or a list has the wrong length
            or sum.

    Examples:
        >>> pipeline_plan(5, 2)
        PipelinePlan(schedule='1f1b', bounds=(0, 3, 5), placement=(0, 1))
        >>> pipeline_plan(8, 2, schedule="zero-bubble-v").placement
        (0, 1, 1, 0)
        >>> pipeline_plan(4, 2, costs=(1, 1, 1, 1), ends=(0, 2)).bounds  # the head costs as much as two layers
        (0, 3, 4)
    """
    if schedule not in SCHEDULES:
        raise ConfigurationError(
            f"The pipeline schedule is unknown: got {schedule!r}, expected one of {', '.join(SCHEDULES)}."
        )
    for what, number in (("layers", num_layers), ("pipeline ranks", ranks)):
        if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 1:
            raise LayoutError(f"The number of {what} is invalid: got {number!r}, expected a positive integer.")
    for what, given in (("layers of the stages", layers), ("costs of the layers", costs), ("ends", ends)):
        if given is not None and (isinstance(given, str) or not isinstance(given, Sequence)):
            raise LayoutError(f"The {what} are invalid: got {given!r}, expected a sequence of numbers.")
    if len(ends) != 2:
        raise LayoutError(f"The ends are invalid: got {ends!r}, expected the times of the embedding and of the head.")
    if costs is None and any(ends):
        raise ConfigurationError(f"ends has no effect: got {ends!r} without costs. Pass costs=, or leave it out.")
    if layers is not None and costs is not None:
        raise ConfigurationError("Both layers and costs are given. Pass one of them.")
    placement = _placement(schedule, ranks, stages_per_rank)
    count = len(placement)
    if num_layers < count:
        raise LayoutError(
            f"There are fewer layers than stages: got {num_layers} layers for {count} stages. Use fewer ranks or "
            "stages_per_rank."
        )
    if layers is not None:
        # A list for several ranks is also valid on one rank, which holds all layers.
        integers = all(isinstance(size, numbers.Integral) for size in layers)
        if not integers or sum(layers) != num_layers or (ranks > 1 and len(layers) != count):
            raise LayoutError(
                f"The layers of the stages are invalid: got {tuple(layers)}, expected {count} numbers with the sum "
                f"{num_layers}."
            )
        sizes = list(layers) if ranks > 1 else [num_layers]
    elif costs is not None:
        if len(costs) != num_layers or not all(math.isfinite(cost) and cost >= 0 for cost in (*costs, *ends)):
            raise LayoutError(
                f"The costs of the layers are invalid: got {len(costs)} numbers, expected {num_layers} that are "
                "finite and not negative."
            )
        sizes = _balanced(costs, count, ends)
    else:
        bounds = [even_stages(num_layers, stage, count) for stage in range(count)]
        sizes = [stop - start for start, stop in bounds]
    return PipelinePlan(schedule=schedule, bounds=(0, *accumulate(sizes)), placement=placement)


def even_stages(num_layers: int, rank: int, size: int) -> tuple[int, int]:
    """Return a stage's first layer and one past its last, distributed evenly; the first stages have one more.

    Examples:
        >>> [even_stages(5, rank, 2) for rank in range(2)]
        [(0, 3), (3, 5)]
    """
    each, more = divmod(num_layers, size)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def _placement(schedule: Schedule, ranks: int, stages_per_rank: int | None) -> tuple[int, ...]:
    if PLACEMENTS[schedule] == "v":
        expected, valid = "2", stages_per_rank in (None, 2)
    elif schedule == "interleaved-1f1b":
        expected, valid = "2 or more", stages_per_rank is None or stages_per_rank >= 2
    else:
        expected, valid = "1", stages_per_rank in (None, 1)
    if not valid:
        raise ConfigurationError(
            f"The number of stages per rank is invalid for {schedule}: got {stages_per_rank}, expected {expected}."
        )
    if ranks == 1:
        return (0,)
    if PLACEMENTS[schedule] == "v":
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(range(ranks)) * (stages_per_rank or _DEFAULT_STAGES[schedule])


def _balanced(costs: Sequence[float], stages: int, ends: tuple[float, float]) -> list[int]:
    """Return the sizes of contiguous parts whose largest cost is smallest; of several, the most even by squares."""
    prefix = [0.0, *accumulate(costs)]
    count = len(costs)

    def cost(stage: int, start: int, stop: int) -> float:
        extra = (ends[0] if stage == 0 else 0.0) + (ends[1] if stage == stages - 1 else 0.0)
        return prefix[stop] - prefix[start] + extra

    best: list[dict[int, tuple[float, float, tuple[int, ...]]]] = [{0: (0.0, 0.0, ())}]
    for stage in range(stages):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for stop in range(stage + 1, count - (stages - 1 - stage) + 1):
            options = []
            for start, (largest, squares, sizes) in best[-1].items():
                if start < stop:
                    here = cost(stage, start, stop)
                    options.append((max(largest, here), squares + here * here, (*sizes, stop - start)))
            reached[stop] = min(options)
        best.append(reached)
    return list(best[-1][count][2])
