"""Everything that depends on the version of torch.distributed.pipelining, whose `step` cuts a batch by itself.

`_step_microbatches` is what `step` calls after the cut. It takes micro-batches as they are, so that packed sequences
with their own `cu_seqlens` are possible.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining import PipelineStage

from polyshard.core.context import ParallelAxis
from polyshard.core.pipeline_plan import PipelinePlan

Record = Callable[[str, int, int, float], None]  # kind of computation, stage, micro-batch, start
Boundary = torch.Tensor  # an empty tensor with the shape and dtype of what travels between two stages


class _Stage(PipelineStage):
    """A stage that calls functions before and after each backward pass, and that evaluates in V placements.

    Without a backward pass, torch 2.13 asks a stage for gradients that its neighbour on the same rank would take, and
    raises (schedules.py:2571).
    """

    before_backward: Callable[[int], None] | None = None
    after_backward: Callable[[], None] | None = None
    record: Record | None = None

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if self.record is not None:
            self.record("forward", self.stage_index, fwd_chunk_id, started)
        return output

    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        started = self._before(bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._after("backward", bwd_chunk_id, started)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        started = self._before(bwd_chunk_id)
        super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._after("weights", bwd_chunk_id, started)

    def _before(self, index: int) -> float:
        if self.has_backward and self.before_backward is not None:
            self.before_backward(index)
        return time.perf_counter()

    def _after(self, kind: str, index: int, started: float) -> None:
        if self.has_backward:
            if self.after_backward is not None:
                self.after_backward()
            if self.record is not None:
                self.record(kind, self.stage_index, index, started)


def make_schedule(
    plan: PipelinePlan,
    modules: Sequence[tuple[int, nn.Module]],
    axis: ParallelAxis,
    device: torch.device,
    tokens: torch.Tensor,
    boundaries: Sequence[Boundary],
    count: int,
    loss: Callable[[Any, Any], torch.Tensor],
    before_backward: Callable[[int], None],
    after_backward: Callable[[], None] | None,
    record: Record | None,
) -> Any:
    """Return a schedule of torch for `count` micro-batches, with static shapes.

    Without the shapes, torch's first step runs every stage forward and backward on empty tensors: collectives, hooks
    and the loss included.

    Args:
        plan: the stages of all ranks.
        modules: this rank's stages, with their numbers: `module(x, index=...)`.
        axis: the pipeline axis.
        device: of activations.
        tokens: an example of the first stage's input.
        boundaries: the output of each stage but the last.
        count: number of micro-batches.
        loss: `(output of the last stage, index)` to a scalar.
        before_backward: called with the index of the micro-batch before each backward pass.
        after_backward: called after each backward pass.
        record: called after each computation.

    Raises:
        ValueError: the schedule does not take this number of micro-batches.
    """
    ends = (tokens, *boundaries, boundaries[-1])
    stages = []
    for number, module in modules:
        stage = _Stage(
            module,
            number,
            plan.num_stages,
            device,
            input_args=ends[number],
            output_args=ends[number + 1],
            group=axis.group,
        )
        stage.before_backward, stage.after_backward, stage.record = before_backward, after_backward, record
        stages.append(stage)
    classes: dict[str, Any] = {
        "gpipe": pipelining.ScheduleGPipe,
        "1f1b": pipelining.Schedule1F1B,
        "interleaved-1f1b": pipelining.ScheduleInterleaved1F1B,
        "zero-bubble-v": pipelining.ScheduleZBVZeroBubble,
        "dualpipe-v": pipelining.ScheduleDualPipeV,
    }
    name = plan.schedule
    if name == "1f1b" and count < plan.num_stages:
        name = "gpipe"  # torch's 1F1B refuses fewer micro-batches than stages, where both are the same order
    if name == "dualpipe-v" and count < plan.num_stages:
        name = "zero-bubble-v"  # the same placement; DualPipeV refuses as well
    given = stages[0] if name in ("gpipe", "1f1b") else stages
    return classes[name](given, n_microbatches=count, loss_fn=loss, scale_grads=False)


def run_schedule(schedule: Any, arguments: list[tuple[Any, ...]], count: int, backward: bool) -> None:
    """Run a schedule's forward passes, and its backward passes unless `backward` is False.

    Args:
        schedule: as made.
        arguments: positional arguments of the first stage for each micro-batch; ignored on other ranks.
        count: number of micro-batches.
        backward: whether gradients are computed.
    """
    stages = schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]
    schedule._has_backward = backward
    for stage in stages:
        stage.has_backward = backward
        stage.clear_runtime_states()
    indices: list[Any] = list(range(count))
    has_last = any(stage.is_last for stage in stages)
    schedule._step_microbatches(
        arg_mbs=arguments if any(stage.is_first for stage in stages) else [()] * count,
        kwarg_mbs=[{"index": index} for index in indices],
        target_mbs=indices if has_last else None,
        losses=None,
        return_outputs=False,
    )
