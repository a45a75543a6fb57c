"""Process groups that Megatron-Core asks for beside those of the axes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.model_weights import gather_over


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """Groups of one engine.

    Attributes:
        model: the ranks of one replica: the tensor and the pipeline axis together.
        experts: the ranks that together hold all experts once: these axes and the expert axis.
        one: this rank.

    They exist until `ps.shutdown`, also after the engine is closed. torch names such a group after its ranks and the
    number of existing groups. If groups were destroyed earlier, the groups of a later engine could get the same names.
    A rank would then read the address of a destroyed group from the store, and wait there without end.
    """

    model: Any
    experts: Any
    one: Any

    @classmethod
    def of(cls, context: ParallelContext) -> ModelGroups:
        """Return the groups of this rank. A collective over the tensor, the pipeline and the expert axis."""
        tensor, pipeline, expert = (context.axis(name) for name in ("tensor", "pipeline", "expert"))
        ranks, model, one = list(tensor.ranks), tensor.group, pipeline.group  # of `adopt`
        with context.guard("model groups setup"):
            if pipeline.size > 1:
                ranks = _together(pipeline, ranks)
                one, model = (_group(members, context) for members in ([pipeline.ranks[pipeline.rank]], ranks))
            experts = model
            if expert.size > 1:
                experts = _group(_together(expert, ranks), context)
        return cls(model=model, experts=experts, one=one)


def _together(axis: ParallelAxis, ranks: list[int]) -> list[int]:
    return sorted(rank for part in gather_over(axis, ranks) for rank in part)


def _group(ranks: list[int], context: ParallelContext) -> Any:
    return dist.new_group(ranks, timeout=timedelta(seconds=context.group_timeout), use_local_synchronization=True)
