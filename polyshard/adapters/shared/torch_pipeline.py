"""Training of pipeline stages by the schedules of torch.distributed.pipelining."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.adapters.shared.torch_pipelining import Boundary, make_schedule, run_schedule
from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError, ConfigurationError
from polyshard.core.model_weights import gather_over
from polyshard.core.stages import Stages
from polyshard.training.pipeline_step import PipelineStep, check_stage_interface
from polyshard.training.train_batch import check_has_gradient


class StageModule(nn.Module):
    """A stage as torch's schedules call it: hidden states in, hidden states out, for the micro-batch `index`.

    Args:
        stage: of the model.
        number: its number over all stages.
    """

    def __init__(self, stage: nn.Module, number: int) -> None:
        super().__init__()
        self.stage = stage
        self.number = number
        self.step: PipelineStep | None = None  # the one under way
        self.expected: Boundary | None = None  # of the output; None for the last stage
        self.error: Exception | None = None

    def forward(self, x: torch.Tensor, *, index: int) -> torch.Tensor:
        """Run the stage, and check that its output has the shape that the next stage receives."""
        assert self.step is not None
        try:
            output = self.step.forward(self.stage, self.number, index, x)
            expected = self.expected
            if expected is not None and (output.shape, output.dtype) != (expected.shape, expected.dtype):
                raise ConfigurationError(
                    f"the output of pipeline stage {self.number} has another shape or dtype than that of the first "
                    f"micro-batch lets expect: got {tuple(output.shape)} {output.dtype}, expected "
                    f"{tuple(expected.shape)} {expected.dtype}. Pass micro-batches of one shape."
                )
            return output
        except Exception as error:
            self.error = error  # torch wraps it in an error that shows tensors
            raise


@dataclass(frozen=True, slots=True)
class Computed:
    """One computation of a stage, as the CPU saw it: on a GPU these are the times of launches.

    Attributes:
        kind: `forward`, `loss`, `backward`, or `weights` (the separate part of a backward pass).
        stage: number of the stage.
        micro_batch: index of the micro-batch.
        start: seconds of `time.perf_counter`.
        stop: the same.
    """

    kind: str
    stage: int
    micro_batch: int
    start: float
    stop: float


class TorchPipeline:
    """The schedule of one engine.

    Attributes:
        events: the computations of this rank are appended here, if it is not None.

    Args:
        stages: this rank's stages.
        context: the parallel context.
        scaled: applies the factor of a float16 run to a loss.
        after_backward: called after each backward pass of a micro-batch.
    """

    def __init__(
        self,
        stages: Stages,
        context: ParallelContext,
        *,
        scaled: Callable[[torch.Tensor], torch.Tensor],
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        check_stage_interface(stages)
        self.modules = [StageModule(stage, number) for number, stage in zip(stages.numbers, stages)]
        self._plan, self._context = stages.plan, context
        self._scaled, self._after = scaled, after_backward
        self._probed: tuple[torch.Size, list[Boundary]] | None = None
        self._key: Any = None
        self._schedule: Any = None
        self._step: PipelineStep | None = None
        self._loss_error: Exception | None = None
        self.events: list[Computed] | None = None

    def run(self, step: PipelineStep, *, backward: bool = True) -> None:
        """Run a step; gradients are added to the parameters' `grad`, not averaged over replicas. A collective.

        Raises:
            ConfigurationError: the schedule does not take this number of micro-batches, or the model's stages do not
                fit together.
        """
        self._step = step
        for module in self.modules:
            module.step, module.error = step, None
        try:
            tokens = step.input_ids(0)
            boundaries = self._boundaries(tokens)
            schedule = self._made(tokens, boundaries, len(step))
            arguments = [(step.input_ids(index),) for index in range(len(step))]
            with step.running(), torch.set_grad_enabled(backward):
                try:
                    run_schedule(schedule, arguments, len(step), backward)
                except Exception:
                    self._key = self._schedule = None  # it is in the middle of a step
                    own = next((m.error for m in self.modules if m.error is not None), self._loss_error)
                    if own is not None:
                        raise own from None
                    raise
        finally:
            self._step = self._loss_error = None
            for module in self.modules:
                module.step = module.error = None

    def _loss(self, output: torch.Tensor, index: int) -> torch.Tensor:
        assert self._step is not None
        started = time.perf_counter()
        try:
            loss = self._scaled(self._step.loss(index, output))
            if torch.is_grad_enabled():
                check_has_gradient(loss)
        except Exception as error:
            self._loss_error = error
            raise
        self._record("loss", self._plan.num_stages - 1, index, started)
        return loss

    def _select(self, index: int) -> None:
        assert self._step is not None
        self._step.select(index)

    def _record(self, kind: str, stage: int, index: int, started: float) -> None:
        if self.events is not None:
            self.events.append(Computed(kind, stage, index, started, time.perf_counter()))

    def _made(self, tokens: torch.Tensor, boundaries: list[Boundary], count: int) -> Any:
        for module in self.modules:
            last = module.number == self._plan.num_stages - 1
            module.expected = None if last else boundaries[module.number]
        key = (count, tokens.shape, tokens.dtype, tuple((b.shape, b.dtype) for b in boundaries))
        if key != self._key:
            self._schedule = None  # free its buffers first
            try:
                self._schedule = make_schedule(
                    self._plan,
                    [(module.number, module) for module in self.modules],
                    self._context.axis("pipeline"),
                    self._context.device,
                    tokens,
                    boundaries,
                    count,
                    self._loss,
                    self._select,
                    self._after,
                    self._record,
                )
            except ValueError as error:
                raise ConfigurationError(
                    f"{self._plan.schedule} does not take {count} micro-batches on {self._plan.ranks} ranks with "
                    f"{self._plan.num_stages} stages: {error}"
                ) from error
            self._key = key
        return self._schedule

    def _boundaries(self, tokens: torch.Tensor) -> list[Boundary]:
        """Return what travels between stages for token IDs of this shape. The first call is a collective."""
        if self._probed is None or len(self._probed[0]) != tokens.dim():
            self._probed = (tokens.shape, self._probe(tokens))
        shape, found = self._probed
        return [_scaled(boundary, shape, tokens.shape) for boundary in found]

    @torch.no_grad()
    def _probe(self, tokens: torch.Tensor) -> list[Boundary]:
        """Run the stages once, one after the other, on the first micro-batch's shapes, without a backward pass.

        torch's own inference would also run the loss and a backward pass on memory that nobody has written.
        """
        axis, device = self._context.axis("pipeline"), self._context.device
        forked: dict[str, Any] = {"devices": []}
        if device.type != "cpu":
            forked = {"devices": [device], "device_type": device.type}
        boundaries: list[Boundary] = []
        for number in range(self._plan.num_stages - 1):
            found: Any = None
            error: Exception | None = None
            module = next((m for m in self.modules if m.number == number), None)
            if module is not None:
                module.expected = None
                x = tokens if number == 0 else torch.zeros_like(boundaries[-1])
                try:
                    # Compiled blocks would be compiled once more, without gradients.
                    with torch.random.fork_rng(**forked), torch.compiler.set_stance("force_eager"):
                        output = module(x, index=0)
                    _check_output(output, number)
                    found = (None, tuple(output.shape), output.dtype)
                except Exception as problem:
                    error = problem
                    found = (f"{type(problem).__name__}: {problem}", None, None)
            with self._context.guard("pipeline shapes"):
                gathered = gather_over(axis, found)
            problem, shape, dtype = gathered[self._plan.placement[number]]
            if error is not None:
                raise error
            if problem is not None:
                failed = axis.ranks[self._plan.placement[number]]
                raise AdapterError(f"Pipeline stage {number} failed on rank {failed}: {problem}")
            boundary = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
            boundaries.append(boundary)
        return boundaries


def _check_output(output: Any, number: int) -> None:
    if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
        what = f"{type(output).__name__}" if not isinstance(output, torch.Tensor) else f"a tensor of {output.dtype}"
        raise ConfigurationError(
            f"the output of pipeline stage {number} is {what}, expected hidden states. Return the hidden states if "
            "`polyshard.pipeline_stage(...).last` is False."
        )


def _scaled(boundary: Boundary, before: torch.Size, now: torch.Size) -> Boundary:
    """Return the boundary for token IDs of another shape: its leading dimensions grow with those of the IDs."""
    if before == now:
        return boundary
    shape = list(boundary.shape)
    for dim, (old, new) in enumerate(zip(before, now)):
        if (shape[dim] * new) % old:
            raise ConfigurationError(
                f"micro-batches have a shape that stages do not divide: got {tuple(now)}, after {tuple(before)} with "
                f"hidden states {tuple(boundary.shape)}."
            )
        shape[dim] = shape[dim] * new // old
    return torch.empty(shape, dtype=boundary.dtype, device=boundary.device, requires_grad=True)
