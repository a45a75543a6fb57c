"""All code that depends on the version of DeepSpeed, for 0.19. Imported on first use of DeepSpeed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.shared.optimizer_state import materialize, slots
from polyshard.adapters.shared.quiet import printing_as_log
from polyshard.core.errors import ConfigurationError
from polyshard.core.pieces import MASTER

# Before the import, during which DeepSpeed detects accelerators and warns on a machine without one.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

logger = logging.getLogger(__name__)

with printing_as_log(logger, "DeepSpeed"):
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.module_inject import layers as _layers
    from deepspeed.module_inject.layers import (
        LinearAllreduce,
        LinearLayer,
        VocabParallelEmbedding,
        VocabParallelLinear,
        set_autotp_mode,
    )
    from deepspeed.runtime import torch_autocast as _autocast
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy
    from deepspeed.utils import groups as _groups
    from pydantic import ValidationError

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it would log every setting to stdout

# The shared-memory all-reduce is compiled at first use (which takes minutes, with a lock that outlives a killed rank),
# ignores its group, and crashes without LOCAL_SIZE: deepspeed/comm/torch.py, inference_all_reduce.
_operators: Any = deepspeed.ops
_operators.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = [
    "LinearAllreduce",
    "LinearLayer",
    "VocabParallelEmbedding",
    "VocabParallelLinear",
    "accelerator",
    "base_optimizer",
    "clear_gradients",
    "deepspeed",
    "enter_training_mode",
    "forget_autocast",
    "forget_mpu",
    "gather_persistent",
    "gathered",
    "partition",
    "vocab_parallel_cross_entropy",
    "zero_fragments",
]


def enter_training_mode() -> Any:
    """Set DeepSpeed's layers to training mode; return a function that restores the previous mode.

    The default is inference mode, which freezes weights and ignores the group of the reduction. The mode is a module
    global that is read when a layer is built and in each forward.
    """
    state: Any = _layers
    previous = state.DEEPSPEED_AUTOTP_MODE
    set_autotp_mode(training=True)

    def restore() -> None:
        state.DEEPSPEED_AUTOTP_MODE = previous

    return restore


def init_communication() -> None:
    """Initialize DeepSpeed's communication, which its layers need, on torch's existing world."""
    if not deepspeed.comm.is_initialized():
        with printing_as_log(logger, "DeepSpeed"):
            backend = torch.distributed.get_backend()
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


@contextmanager
def naming_wrong_settings() -> Iterator[None]:
    """Return a context in which a value of the configuration that DeepSpeed rejects is a `ConfigurationError`."""
    try:
        yield
    except ValidationError as error:  # of pydantic, by which DeepSpeed reads its configuration
        wrong = [f"{'.'.join(map(str, each['loc']))}={each['input']!r} ({each['msg']})" for each in error.errors()]
        raise ConfigurationError(
            f"config has settings that DeepSpeed rejects: got {'; '.join(wrong)}. See {error.title} of DeepSpeed."
        ) from error


def forget_mpu() -> None:
    """Clear the global in which an engine leaves its mpu, where the next engine would find it."""
    state: Any = _groups
    state.mpu = None


def forget_autocast() -> None:
    """Clear the global that an engine with `torch_autocast` leaves set; call it before an engine is built.

    ZeRO's optimizers read it when they are built (stage_1_and_2.py and stage3.py, `is_autocast_initialized`): a later
    engine without autocast would reduce gradients in the dtype of the parameters in place of float32.
    """
    state: Any = _autocast
    state.TORCH_AUTOCAST_INITIALIZED, state.TORCH_AUTOCAST_DTYPE = False, None


def gathered(parameters: Any, modifier_rank: int | None = None) -> Any:
    """Return a context manager that gathers parameters partitioned by ZeRO-3; no-op for others."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


def accelerator() -> str:
    """Return the device type that DeepSpeed chose for this process."""
    return get_accelerator().device_name()


def base_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside ZeRO's, after creating its state if no step was taken."""
    base = getattr(optimizer, "optimizer", optimizer)
    partitions = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if partitions is None:
        materialize(base)
        return base
    # Stage 3 puts its partitions into the groups only during a step (zero/stage3.py, _optimizer_step).
    held = [group["params"] for group in base.param_groups]
    try:
        for group in base.param_groups:
            group["params"] = []
        base.param_groups[0]["params"] = list(partitions)
        materialize(base)
    finally:
        for group, parameters in zip(base.param_groups, held):
            group["params"] = parameters
    return base


def clear_gradients(optimizer: Any) -> None:
    """Clear gradients, including those of earlier micro-batches.

    `zero_grad` of ZeRO 1 and 2 leaves the partitions into which `backward` has averaged them, and the next step would
    use them (stage_1_and_2.py, independent_gradient_partition_epilogue). This does what ZeRO does after an overflow.
    """
    optimizer.zero_grad()
    if not hasattr(optimizer, "all_grad_tensors"):  # stage 0, or 3
        return
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer._release_preflattened_grad_buffers()
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
    for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        held.update(dict.fromkeys(held))


def partition(parameter: Any, rank: int) -> tuple[int, torch.Tensor]:
    """Return the offset of this rank's partition of a ZeRO-3 parameter, and its elements.

    Every rank holds an equal range of the flattened parameter, padded at the end
    (zero/partition_parameters.py, _partition_param).
    """
    held = parameter.ds_tensor
    start = min(rank * held.numel(), parameter.ds_numel)
    return start, held.data.view(-1)[: max(0, min(held.numel(), parameter.ds_numel - start))]


def zero_fragments(
    optimizer: Any, base: Any, parameter: Any, stage: int, rank: int
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield slot, offset and memory of this rank's fragments of a parameter's fp32 copy and optimizer state.

    Args:
        optimizer: the ZeRO optimizer.
        base: its `base_optimizer`.
        parameter: a parameter of the model.
        stage: the ZeRO stage.
        rank: this rank's position among the replicas.
    """
    if stage == 3:
        place = optimizer.grad_position.get(optimizer.get_param_id(parameter))
        if place is None:  # not trained
            return
        start, held = partition(parameter, rank)
        group = place[0]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        for slot in (MASTER, *slots(base, flat)):
            key = None if slot == MASTER else slot
            values, _ = optimizer._get_fp32_opt_state_partition(parameter, False, key)
            yield slot, start, values.detach()[: held.numel()]
        return
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return
    address = mapping.get_hp_fragment_address()
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    start = mapping.lp_fragment_address.start
    for slot, whole in {MASTER: flat, **slots(base, flat)}.items():
        yield slot, start, whole.detach().view(-1)[address.start : address.start + address.numel]


def gather_persistent(optimizer: Any) -> None:
    """Gather the small parameters again that ZeRO-3 keeps replicated on every rank."""
    stale = [p for p in optimizer.persistent_parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
    if stale:
        stale[0].partition(stale)  # drops the gathered values, and keeps the partition unchanged
        stale[0].all_gather(stale)


def fp32_weights(directory: Path, tag: str, *, frozen: bool) -> dict[str, torch.Tensor]:
    """Return the fp32 weights of a ZeRO checkpoint with one tensor-parallel rank, loaded by DeepSpeed's own code.

    Args:
        directory: the directory that contains the folder of the tag.
        tag: name of that folder.
        frozen: include frozen parameters, which DeepSpeed finds only in checkpoints of ZeRO 2 and 3.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with printing_as_log(logger, "DeepSpeed"):
        weights: Any = get_fp32_state_dict_from_zero_checkpoint(
            str(directory), tag=tag, exclude_frozen_parameters=not frozen
        )
    return dict(weights)
