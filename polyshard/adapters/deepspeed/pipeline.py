"""Training of pipeline stages by DeepSpeed's PipelineEngine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from polyshard.adapters.deepspeed.pipeline_compat import ScheduledStage, hold_back, pipeline_module, run_schedule
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.stages import Stages
from polyshard.training.pipeline_step import PipelineStep, check_stage_interface
from polyshard.training.train_batch import check_has_gradient

# Stages exchange full hidden states. DeepSpeed's default divides them over the tensor axis, by a shape that it keeps
# from the first micro-batch.
SETTINGS: Mapping[str, Any] = {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}}


class DeepspeedPipeline:
    """The schedule of one engine.

    Args:
        stages: this rank's stages.
        context: the parallel context.

    Raises:
        ConfigurationError: DeepSpeed lacks the schedule, or the stages do not take hidden states.
    """

    def __init__(self, stages: Stages, context: ParallelContext) -> None:
        check_stage_interface(stages)
        (stage,), (self._number,) = stages, stages.numbers
        self._last = stages.last is not None
        self._context = context
        self._step: PipelineStep | None = None
        self._index = -1  # of the micro-batch whose forward pass came last
        self._shapes: Any = None
        with context.guard("pipeline setup"):
            self.module = pipeline_module(ScheduledStage(stage, self._forward), self._loss, context)

    def run(self, engine: Any, step: PipelineStep, *, backward: bool) -> None:
        """Run a step; gradients are added to the parameters' `grad`, not averaged over replicas. A collective.

        Args:
            engine: DeepSpeed's, around `module`.
            step: the micro-batches.
            backward: whether to compute gradients.
        """
        shapes = [step.input_ids(index).shape for index in range(len(step))]
        same = len(set(shapes)) == 1
        key = shapes[0] if same else None
        self._step, self._index = step, -1
        hold_back(engine)
        try:
            with step.running(), torch.set_grad_enabled(backward):
                run_schedule(
                    engine,
                    len(step),
                    same_shapes=same,
                    new_shapes=not same or key != self._shapes,
                    backward=backward,
                )
            self._shapes = key
        finally:
            self._step = None

    def _forward(self, stage: nn.Module, received: torch.Tensor) -> torch.Tensor:
        assert self._step is not None
        self._index += 1
        output = self._step.forward(stage, self._number, self._index, received)
        if self._last:
            return output
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            what = f"a tensor of {output.dtype}" if isinstance(output, torch.Tensor) else type(output).__name__
            raise ConfigurationError(
                f"the output of pipeline stage {self._number} is {what}, expected hidden states. Return the hidden "
                "states if `polyshard.pipeline_stage(...).last` is False."
            )
        output = output.contiguous()
        if torch.is_grad_enabled() and not output.requires_grad:  # nothing is trained up to here
            output.requires_grad_()
        return output

    def _loss(self, output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        del label
        assert self._step is not None
        share = self._step.loss(self._index, output)
        if torch.is_grad_enabled():
            check_has_gradient(share)
        return share


def check_pipeline(stages: Stages, stage: int, offload: str, config: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for what DeepSpeed's pipelines lack."""
    if stages.plan.schedule != "1f1b":
        raise ConfigurationError(
            f"DeepSpeed has no schedule {stages.plan.schedule}: expected 1f1b. Pass schedule='1f1b' to pipeline_plan, "
            "or train with the torch adapter, which runs DeepSpeed's layers on torch's schedules."
        )
    if stage > 1:
        raise ConfigurationError(
            f"DeepSpeed's pipelines have ZeRO stages 0 and 1: got zero_stage={stage}. Gradients of stage 2 and weights "
            "of stage 3 would be exchanged for each micro-batch, which its PipelineEngine refuses."
        )
    if offload != "none":
        raise ConfigurationError(
            f"offload={offload!r} is unsupported in DeepSpeed's pipelines: ZeRO-Offload copies gradients in hooks that "
            "its PipelineEngine does not run. Omit it, or train with the torch adapter."
        )
    if "pipeline" in config:
        raise ConfigurationError(
            f"config sets the pipeline: got {config['pipeline']!r}. Activations are recomputed by recompute=, and "
            "hidden states are not divided over the tensor axis. Omit it."
        )
