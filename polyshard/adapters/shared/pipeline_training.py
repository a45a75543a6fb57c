"""Pipelines of the libraries that train on torch's schedules: run one step, and leave the gradients that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from polyshard.adapters.shared.reducer import GradientReducer
from polyshard.adapters.shared.tied_weights import copy_from_owners, sum_tied_gradients
from polyshard.adapters.shared.torch_pipeline import StageModule, TorchPipeline
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.model_weights import ModelWeights
from polyshard.core.pipeline_plan import SPLIT_BACKWARD
from polyshard.core.stages import Stages
from polyshard.training.pipeline_step import PipelineStep
from polyshard.training.recompute import Recompute


class PipelineTraining:
    """The pipeline of one engine.

    DistributedDataParallel gets no stage: its hooks do not fire in schedules that compute gradients of weights
    separately (pytorch#144530), so replicas would drift apart. A reducer runs after the schedule.

    Attributes:
        schedule: the stages under torch's schedule.

    Args:
        stages: this rank's stages; copies of tied weights get the values of their owners. A collective.
        weights: the weights of all stages.
        context: the parallel context.
        updated: returns the tensors that the optimizer updates, by name.
        scaled: applies the factor of a float16 run to a loss.
        recompute: the engine's option.
        reducer: averages gradients over the replicas; None if the library's own hooks do.
        local: gives this rank's part of a gradient.

    Raises:
        ConfigurationError: the schedule does not allow the recomputation.
    """

    def __init__(
        self,
        stages: Stages,
        weights: ModelWeights,
        context: ParallelContext,
        updated: Callable[[], Iterable[tuple[str, nn.Parameter]]],
        *,
        scaled: Callable[[torch.Tensor], torch.Tensor],
        recompute: Recompute,
        reducer: GradientReducer | None,
        local: Callable[[Any], torch.Tensor] = lambda gradient: gradient,
    ) -> None:
        splits = stages.plan.schedule in SPLIT_BACKWARD
        if splits and recompute == "selective":
            raise ConfigurationError(
                f"recompute='selective' is unsupported with {stages.plan.schedule}: torch runs the backward pass of "
                "such a block only once, and the schedule runs it for inputs and for weights. Use 'full', or 1f1b."
            )
        copy_from_owners(dict(stages.named_parameters()), weights, context)
        self._weights, self._context, self._updated = weights, context, updated
        self._reducer, self._local = reducer, local
        collect = reducer.collect if splits and reducer is not None else None
        self.schedule = TorchPipeline(stages, context, scaled=scaled, after_backward=collect)

    @property
    def modules(self) -> list[StageModule]:
        """The modules that the schedule calls, one for each stage of this rank."""
        return self.schedule.modules

    def run(self, step: PipelineStep, *, backward: bool) -> None:
        """Run a step; with `backward`, leave gradients averaged over replicas and summed over copies. A collective."""
        if not backward:
            self.schedule.run(step, backward=False)
            return
        # Gradients of an earlier train_batch are whole already: they must not be summed over tied copies again.
        earlier = [(parameter, parameter.grad) for _, parameter in self._updated() if parameter.grad is not None]
        for parameter, _ in earlier:
            parameter.grad = None
        reducer = self._reducer
        if reducer is None:
            self.schedule.run(step)
        else:
            reducer.sends = False
            try:
                self.schedule.run(step)
            finally:
                reducer.sends = True
            with self._context.guard("data gradients"):
                reducer.finish()
        sum_tied_gradients(dict(self._updated()), self._weights, self._context, self._local)
        for parameter, gradient in earlier:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
