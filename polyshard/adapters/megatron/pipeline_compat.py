"""All code of pipelines and process groups that depends on the version of Megatron-Core, for 0.16 to 0.19."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from polyshard.adapters.megatron.compat import cuda_as_cpu
from polyshard.adapters.megatron.model_groups import ModelGroups

ForwardStep = Callable[[Iterator[int], Any], Any]

# Fields of TransformerConfig that the schedules read on any model's config; models of polyshard do without them.
_ABSENT = {
    "fp4": None,
    "fp8": None,
    "mtp_num_layers": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_load_balancing_type": "none",
    "fine_grained_activation_offloading": False,
}


class ScheduledStage(nn.Module):
    """A pipeline stage with the attributes that Megatron's schedules look for.

    Args:
        stage: of the model.
        config: of all stages of this rank.
        chunk: its position among this rank's stages; None if there is one.
    """

    def __init__(self, stage: nn.Module, config: Any, chunk: int | None) -> None:
        super().__init__()
        self.stage = stage
        self.config = config
        self.model_type = ModelType.encoder_or_decoder
        self.received: torch.Tensor | None = None
        if chunk is not None:
            self.vp_stage = chunk

    def set_input_tensor(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Keep what the stage before has sent; None for the first stage."""
        (self.received,) = tensors

    def forward(self, run: Callable[[nn.Module, torch.Tensor | None], torch.Tensor]) -> torch.Tensor:
        """Call `run` with the stage and what it received; DistributedDataParallel calls this."""
        received, self.received = self.received, None
        return run(self.stage, received)


def process_groups(
    *, tensor: Any, data: Any, pipeline: Any, expert: Any, expert_data: Any, groups: ModelGroups
) -> ProcessGroupCollection:
    """Return the groups that DDP, the optimizer and schedules need, without `initialize_model_parallel` and globals.

    Args:
        tensor: the tensor axis.
        data: the replicas.
        pipeline: the pipeline axis.
        expert: the expert axis; None for one rank.
        expert_data: the replicas of experts, if they are distributed; else the replicas.
        groups: those of several axes. The context axis has no other group than its `one`, since it is in `data`: the
            schedules would multiply losses by its size and divide lengths.
    """
    named = {
        **dict.fromkeys(("tp", "expt_tp", "tp_ep", "tp_cp"), tensor),
        "mp": groups.model,
        "tp_ep_pp": groups.experts,
        **dict.fromkeys(("dp", "dp_cp", "intra_dp_cp"), data),
        **dict.fromkeys(("expt_dp", "intra_expt_dp"), expert_data),
        "ep": expert or groups.one,
        **dict.fromkeys(("cp", "gtp_remat", "expt_gtp_remat"), groups.one),
        "pp": pipeline,
        **dict.fromkeys(("embd", "pos_embd"), None),  # the engine sums gradients of tied weights
        **dict.fromkeys(("intra_dist_opt", "tp_dp_cp"), dist.group.WORLD),
    }
    known = {field.name for field in fields(ProcessGroupCollection)}
    return ProcessGroupCollection(**{name: group for name, group in named.items() if name in known})


def configure_pipeline(config: Any, ranks: int, stages: int, dtype: torch.dtype) -> None:
    """Set the fields of a config that schedules read.

    Args:
        config: of DistributedDataParallel, where the schedules find it.
        ranks: pipeline ranks.
        stages: of each rank.
        dtype: of the hidden states.
    """
    interleaved = stages > 1
    config.pipeline_model_parallel_size = ranks
    config.virtual_pipeline_model_parallel_size = stages if interleaved else None
    config.microbatch_group_size_per_vp_stage = ranks
    config.pipeline_dtype = dtype
    # With two ranks the next one is the previous one, and batched messages of the interleaved schedule are mixed up:
    # gradients are wrong in silence (Megatron-LM#750). Without batches each direction has its own process group.
    config.overlap_p2p_comm = interleaved
    config.batch_p2p_comm = not interleaved
    config.batch_p2p_sync = False
    config.deallocate_pipeline_outputs = False  # it refuses outputs that are views of other tensors
    config.finalize_model_grads_func = None
    for name, value in _ABSENT.items():
        if not hasattr(config, name):
            setattr(config, name, value)


def run_schedule(
    chunks: Sequence[Any],
    config: Any,
    group: dist.ProcessGroup,
    groups: Any,
    forward_step: ForwardStep,
    count: int,
    *,
    shape: tuple[int, int, int] | None,
    backward: bool,
    device: torch.device,
) -> None:
    """Run Megatron's 1F1B schedule, or the interleaved one for several stages, on all micro-batches of a step.

    Args:
        chunks: this rank's wrapped stages.
        config: from `configure_pipeline`.
        group: the pipeline axis.
        groups: Megatron's collection of process groups.
        forward_step: `(iterator of micro-batch indices, stage) -> (output, loss function)`.
        count: number of micro-batches.
        shape: of all tensors between stages; None sends each one's shape before it.
        backward: whether to compute gradients.
        device: on which this rank computes.
    """
    interleaved = len(chunks) > 1
    config.variable_seq_lengths = shape is None
    sequence, batch, config.hidden_size = shape or (1, 1, 1)
    if config.sequence_parallel:
        sequence *= config.tensor_model_parallel_size  # the schedule divides it again
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if interleaved else chunks[0].no_sync
    run = get_forward_backward_func(pp_size=group.size(), vp_size=len(chunks) if interleaved else None)
    indices = [iter(range(count)) for _ in chunks]
    with _on_device(device):
        run(
            forward_step_func=forward_step,
            data_iterator=indices if interleaved else indices[0],
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=count,
            seq_length=sequence,
            micro_batch_size=batch,
            forward_only=not backward,
            p2p_communicator=P2PCommunicator(group, config),
            pg_collection=groups,
        )


@contextlib.contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Make the schedules work on a CPU rank: they also call `torch.cuda.synchronize` (p2p_communication.py, 0.16.1)."""
    if device.type == "cuda":
        yield
        return
    cuda: Any = torch.cuda
    original = cuda.synchronize
    cuda.synchronize = lambda device=None: None
    try:
        with cuda_as_cpu(device):
            yield
    finally:
        cuda.synchronize = original
