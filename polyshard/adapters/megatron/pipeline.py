"""Training of pipeline stages by Megatron-Core's schedules: 1F1B and interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from polyshard.adapters.megatron.pipeline_compat import ScheduledStage, configure_pipeline, run_schedule
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.model_weights import ModelWeights, gather_over
from polyshard.core.stages import Stages
from polyshard.training.pipeline_step import PipelineStep, check_stage_interface
from polyshard.training.train_batch import check_has_gradient

SCHEDULES = ("1f1b", "interleaved-1f1b")

Wire = tuple[int, int, int]  # Megatron sends tensors of three dimensions


class MegatronPipeline:
    """The schedule of one engine.

    Args:
        stages: this rank's stages.
        context: the parallel context.
        config: Megatron's, which its DistributedDataParallel gets, too.
        groups: Megatron's collection of process groups.
        dtype: of the hidden states between stages.

    Raises:
        ConfigurationError: Megatron lacks the schedule, or the stages do not take hidden states.
    """

    def __init__(self, stages: Stages, context: ParallelContext, config: Any, groups: Any, dtype: torch.dtype) -> None:
        if stages.plan.schedule not in SCHEDULES:
            raise ConfigurationError(
                f"Megatron has no schedule {stages.plan.schedule}: expected {' or '.join(SCHEDULES)}. Pass schedule= "
                "to pipeline_plan, or train with the torch adapter, which runs Megatron's layers on torch's schedules."
            )
        check_stage_interface(stages)
        self._plan, self._context, self._config, self._groups = stages.plan, context, config, groups
        self._dtype = dtype
        several = len(stages) > 1
        self.modules = [ScheduledStage(stage, config, i if several else None) for i, stage in enumerate(stages)]
        self._numbers = dict(zip(self.modules, stages.numbers))
        self._known: tuple[Any, Wire | None] | None = None  # micro-batches, and the one shape between their stages
        self._expected: Wire | None = None
        self._sent: set[Wire] = set()
        configure_pipeline(config, stages.plan.ranks, len(stages), dtype)

    def run(self, chunks: Sequence[Any], step: PipelineStep, *, backward: bool, scale: Any = None) -> None:
        """Run a step; gradients are added to `main_grad`, not averaged over replicas. A collective.

        Args:
            chunks: the wrappers of `modules`.
            step: the micro-batches.
            backward: whether to compute gradients.
            scale: applies the factor of a float16 run to a loss; None for others.

        Raises:
            ConfigurationError: the schedule does not take this number of micro-batches, or the stages do not fit.
        """
        count, ranks = len(step), self._plan.ranks
        if len(chunks) > 1 and count % ranks:
            raise ConfigurationError(
                f"Megatron's interleaved-1f1b does not take {count} micro-batches on {ranks} pipeline ranks: expected "
                f"a multiple of {ranks}."
            )

        def forward_step(indices: Iterator[int], chunk: Any) -> tuple[torch.Tensor, Any]:
            index = next(indices)
            number = self._numbers[chunk.module]
            last = number == self._plan.num_stages - 1

            def compute(stage: nn.Module, received: torch.Tensor | None) -> torch.Tensor:
                hidden = None if received is None else _from_wire(received)
                output = step.forward(stage, number, index, hidden)
                return output if last else self._on_wire(output, number)

            def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
                share = step.loss(index, output)
                if backward:
                    check_has_gradient(share)
                return share * count, {}  # Megatron divides by the number of micro-batches, in place

            return chunk(compute), loss

        lengths = tuple(step.input_ids(index).shape for index in range(count))
        known = self._known is not None and self._known[0] == lengths
        self._expected = self._known[1] if self._known is not None and known else None
        self._sent.clear()
        self._config.grad_scale_func = scale
        axis = self._context.axis("pipeline")
        assert axis.group is not None
        with step.running(), torch.set_grad_enabled(backward):
            run_schedule(
                chunks,
                self._config,
                axis.group,
                self._groups,
                forward_step,
                count,
                shape=self._expected,
                backward=backward,
                device=self._context.device,
            )
            if not known and len(set(lengths)) == 1:  # the next step of these micro-batches sends no shapes
                found = set().union(*gather_over(axis, self._sent))
                self._known = lengths, found.pop() if len(found) == 1 else None

    def _on_wire(self, output: Any, number: int) -> torch.Tensor:
        """Return hidden states as three dimensions: `[tokens, hidden]` as `[tokens, hidden, 1]`."""
        if not isinstance(output, torch.Tensor) or output.dim() not in (2, 3) or output.dtype != self._dtype:
            what = (
                f"{tuple(output.shape)} {output.dtype}" if isinstance(output, torch.Tensor) else type(output).__name__
            )
            raise ConfigurationError(
                f"the output of pipeline stage {number} is {what}, expected hidden states [tokens, hidden] or "
                f"[batch, seq, hidden] in {self._dtype}. Return the hidden states if "
                "`polyshard.pipeline_stage(...).last` is False."
            )
        if output.dim() == 3 and output.shape[2] == 1:
            raise ConfigurationError(
                f"the hidden states of pipeline stage {number} have one element: got {tuple(output.shape)}. Megatron's "
                "schedules could not tell them from [tokens, hidden]."
            )
        wire = (output.unsqueeze(2) if output.dim() == 2 else output).contiguous()
        shape = (wire.shape[0], wire.shape[1], wire.shape[2])
        if self._expected not in (None, shape):
            raise ConfigurationError(
                f"the output of pipeline stage {number} has another shape than in the step before: got "
                f"{tuple(output.shape)} for micro-batches of the same shape."
            )
        self._sent.add(shape)
        return wire


def hidden_dtype(weights: ModelWeights, context: ParallelContext) -> torch.dtype:
    """Return the dtype of hidden states between stages: that of exact mode, or of the narrowest weights.

    Frozen weights count: beside a bfloat16 base the matrices of LoRA, which are trained, are float32.
    """
    if context.exact is not None and context.exact.compute_dtype is not None:
        return context.exact.compute_dtype
    return min((d for d in weights.dtypes.values() if d.is_floating_point), key=lambda dtype: dtype.itemsize)


def _from_wire(received: torch.Tensor) -> torch.Tensor:
    return received.squeeze(2) if received.shape[2] == 1 else received
