"""Process groups that Megatron-Core asks for beside those of the axes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from polyshard.core.context import ParallelContext
from polyshard.core.model_weights import gather_over


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """Groups of one engine.

    Attributes:
        model: the ranks of one replica: the tensor and the pipeline axis together.
        one: this rank.
        made: those that the engine created.
    """

    model: Any
    one: Any
    made: tuple[Any, ...]

    @classmethod
    def of(cls, context: ParallelContext) -> ModelGroups:
        """Return the groups of this rank. A collective over the tensor and the pipeline axis."""
        tensor, pipeline = context.axis("tensor"), context.axis("pipeline")
        if pipeline.size == 1:  # `adopt` has made its group
            return cls(model=tensor.group, one=pipeline.group, made=())
        with context.guard("pipeline setup"):
            ranks = sorted(rank for part in gather_over(pipeline, tensor.ranks) for rank in part)
            made = [_group(members, context) for members in ([pipeline.ranks[pipeline.rank]], ranks)]
        return cls(model=made[1], one=made[0], made=tuple(made))

    def close(self) -> None:
        """Destroy the groups that were created."""
        for group in self.made:
            if dist.is_initialized():
                dist.destroy_process_group(group)


def _group(ranks: list[int], context: ParallelContext) -> Any:
    return dist.new_group(ranks, timeout=timedelta(seconds=context.group_timeout), use_local_synchronization=True)
