"""Checks of an engine that trains a pipeline."""

from __future__ import annotations

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, RankFailureError
from polyshard.core.model_weights import ModelWeights
from polyshard.core.stages import Stages


def check_trained_stages(weights: ModelWeights, context: ParallelContext) -> None:
    """Raise `ConfigurationError` on all ranks of a pipeline if one of them has nothing to train."""
    axis, frozen = context.axis("pipeline"), weights.frozen_ranks
    if frozen:
        raise ConfigurationError(
            f"ranks {[axis.ranks[at] for at in frozen]} of a pipeline have nothing to train: their stages have no "
            "parameter that requires a gradient. Train a layer of each rank, or divide the layers by pipeline_plan("
            "layers=...) so that each rank has one that is trained."
        )


def check_not_interrupted(error: str | None, context: ParallelContext) -> None:
    """Raise `RankFailureError` if an error ended an earlier schedule of this rank before its end."""
    if error is not None:
        axis = context.axis("pipeline")
        raise RankFailureError(
            f"rank {axis.ranks[axis.rank]}: an earlier step of this pipeline ended in the middle of its schedule "
            f"({error}), so that the ranks are no longer in step. Restart all ranks from a checkpoint.",
            (axis.ranks[axis.rank],),
        )


def refuse_in_pipeline(stages: Stages | None, what: str) -> None:
    """Raise `ConfigurationError` for what only an engine without a pipeline has."""
    if stages is not None:
        raise ConfigurationError(
            f"{what} does not exist in a pipeline of {stages.plan.num_stages} stages. Use "
            "engine.train_batch(micro_batches) and engine.step(), or engine.eval_batch(micro_batches)."
        )
