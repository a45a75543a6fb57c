"""Process groups that Megatron-Core asks for beside those of the axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polyshard.adapters.shared.groups import destroy, group_of, is_alive
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.model_weights import gather_over


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """Groups of one engine.

    Attributes:
        model: the ranks of one replica: the tensor and the pipeline axis together.
        experts: the ranks that together hold all experts once: these axes and the expert axis.
        one: this rank.
        made: those that the engine created.
    """

    model: Any
    experts: Any
    one: Any
    made: tuple[Any, ...]

    @classmethod
    def of(cls, context: ParallelContext) -> ModelGroups:
        """Return the groups of this rank. A collective over the tensor, the pipeline and the expert axis."""
        tensor, pipeline, expert = (context.axis(name) for name in ("tensor", "pipeline", "expert"))
        ranks, model, one, made = list(tensor.ranks), tensor.group, pipeline.group, []  # of `adopt`
        with context.guard("model groups setup"):
            if pipeline.size > 1:
                ranks = _together(pipeline, ranks)
                one, model = made = [_group(members, context) for members in ([pipeline.ranks[pipeline.rank]], ranks)]
            experts = model
            if expert.size > 1:
                experts = _group(_together(expert, ranks), context)
                made = [*made, experts]
        return cls(model=model, experts=experts, one=one, made=tuple(made))

    def close(self) -> None:
        """Destroy the groups that were created."""
        for group in self.made:
            if is_alive(group):
                destroy(group)


def _together(axis: ParallelAxis, ranks: list[int]) -> list[int]:
    return sorted(rank for part in gather_over(axis, ranks) for rank in part)


def _group(ranks: list[int], context: ParallelContext) -> Any:
    return group_of(ranks, timeout=context.group_timeout)
