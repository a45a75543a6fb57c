"""All code of pipelines that depends on the version of DeepSpeed, for 0.19."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polyshard.adapters.shared.quiet import printing_as_log
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError

logger = logging.getLogger(__name__)

with printing_as_log(logger, "DeepSpeed"):
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe import schedule as _schedule
    from deepspeed.runtime.pipe.topology import ProcessTopology

# The engine reduces gradients and updates weights in `step`, and not at the end of each schedule.
_HELD_BACK = (_schedule.ReduceTiedGrads, _schedule.ReduceGrads, _schedule.OptimizerStep)


class ScheduledStage(nn.Module):
    """A pipeline stage as the one layer that DeepSpeed sees of it: one tensor in, one tensor out.

    Args:
        stage: of the model.
        run: called with the stage and what the stage before has sent.
    """

    def __init__(self, stage: nn.Module, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stage = stage
        self._run = run

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        """Return the stage's output."""
        return self._run(self.stage, received)


class _ElsewhereStage(nn.Module):
    """Stands for a stage of another rank, so that DeepSpeed counts as many layers as stages."""


def pipeline_module(stage: ScheduledStage, loss: Callable[[Any, Any], Any], context: ParallelContext) -> PipelineModule:
    """Return DeepSpeed's module of one stage per pipeline rank. A collective over all ranks, which makes groups.

    Args:
        stage: this rank's.
        loss: `(output of the last stage, label)` to the loss of a micro-batch.
        context: the parallel context.

    Raises:
        ConfigurationError: the ranks of the context are in another order than DeepSpeed's.
    """
    pipeline, replicas, tensor = context.axis("pipeline"), replica_axis(context), context.axis("tensor")
    # The context axis is a part of DeepSpeed's data axis, over which it averages gradients.
    topology = ProcessTopology(axes=["pipe", "data", "model"], dims=[pipeline.size, replicas.size, tensor.size])
    found = topology.get_coord(dist.get_rank())
    if (found.pipe, found.data, found.model) != (pipeline.rank, replicas.rank, tensor.rank):
        raise ConfigurationError(
            f"the ranks of the context have another order than DeepSpeed's pipelines: got pipeline {pipeline.rank}, "
            f"data {replicas.rank}, tensor {tensor.rank} for rank {dist.get_rank()}, expected {found.pipe}, "
            f"{found.data}, {found.model}. Use polyshard.initialize."
        )
    layers: list[nn.Module] = [_ElsewhereStage() for _ in range(pipeline.size)]
    layers[pipeline.rank] = stage
    trained = [module.training for module in stage.modules()]
    with printing_as_log(logger, "DeepSpeed"), _local_rank(context.device):
        # "uniform" gives each rank one layer; by default every rank would build all layers to count parameters.
        module = PipelineModule(layers, topology=topology, loss_fn=loss, partition_method="uniform")
    assert trained == [module.training for module in stage.modules()]
    for group in _groups(module):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=context.group_timeout), group)
    return module


def hold_back(engine: Any) -> None:
    """Make the schedules of an engine end after the last backward pass."""
    held = dict.fromkeys(_HELD_BACK, lambda self: None)
    engine._INSTRUCTION_MAP = {**type(engine)._INSTRUCTION_MAP, **held}


def run_schedule(engine: Any, count: int, *, same_shapes: bool, new_shapes: bool, backward: bool) -> None:
    """Run DeepSpeed's 1F1B schedule, or its schedule without backward passes.

    Args:
        engine: DeepSpeed's.
        count: number of micro-batches.
        same_shapes: whether all micro-batches have one shape; else the shape is sent before each tensor.
        new_shapes: whether the shapes are not those of the call before.
        backward: whether to compute gradients.
    """
    # Not gradient_accumulation_steps, by which DeepSpeed would divide the loss.
    engine.micro_batches = count
    engine.dynamic_shape = not same_shapes
    if new_shapes:
        engine.reset_activation_shape()  # buffers would cut tensors to the shape of the first ones (DeepSpeed#3195)
    engine._compute_loss = True
    engine.total_loss = None
    nothing = torch.zeros((), dtype=torch.int64, device=engine.device)  # stages know their micro-batches
    engine.set_dataiterator(repeat((nothing, nothing)))
    # `train_batch` and `eval_batch` would also set the mode of the modules, and exchange losses.
    engine._exec_schedule(engine._train_schedule() if backward else engine._inference_schedule(count))
    engine.fwd_outputs = []
    engine.total_loss = None


def accumulated_gradient(engine: Any, parameter: Any) -> torch.Tensor:
    """Return the gradient that `reduce_gradients` will read, zeros if there is none yet.

    ZeRO 1 adds up the gradients of narrow parameters in float32, outside of `grad` (stage_1_and_2.py).
    """
    optimizer = engine.optimizer
    wide = getattr(optimizer, "use_grad_accum_attribute", False)
    name, dtype = ("grad_accum", optimizer.gradient_accumulation_dtype) if wide else ("grad", parameter.dtype)
    if getattr(parameter, name) is None:
        setattr(parameter, name, torch.zeros_like(parameter, dtype=dtype))
    return getattr(parameter, name)


def reduce_gradients(engine: Any) -> None:
    """Average the gradients of all schedules since the last step over the replicas."""
    engine._exec_reduce_grads()


def take_step(engine: Any) -> None:
    """Clip the gradients, update the weights, and clear the gradients."""
    engine._exec_optimizer_step()


def _groups(module: PipelineModule) -> Iterator[Any]:
    grid = module._grid
    yield from (grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group)


@contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """Set LOCAL_RANK, which PipelineModule reads to choose the device to which it moves the stage."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
