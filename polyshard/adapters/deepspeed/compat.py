"""All that depends on DeepSpeed's version; written for 0.19. Imported on first use of DeepSpeed."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from polyshard.adapters.shared.quiet import printing_as_log

# Before the import: DeepSpeed looks for accelerators then, and warns on a machine without one.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

logger = logging.getLogger(__name__)

with printing_as_log(logger, "DeepSpeed"):
    import deepspeed
    import deepspeed.ops
    from deepspeed.module_inject import layers as _layers
    from deepspeed.module_inject.layers import (
        LinearAllreduce,
        LinearLayer,
        VocabParallelEmbedding,
        VocabParallelLinear,
        set_autotp_mode,
    )
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy
    from deepspeed.utils import groups as _groups

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it logs every setting to stdout

# The shared-memory all-reduce is built at its first use (minutes, and a lock that outlives a killed rank), ignores
# its group, and crashes without LOCAL_SIZE: deepspeed/comm/torch.py, inference_all_reduce.
_operators: Any = deepspeed.ops
_operators.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = [
    "LinearAllreduce",
    "LinearLayer",
    "VocabParallelEmbedding",
    "VocabParallelLinear",
    "deepspeed",
    "enter_training_mode",
    "forget_mpu",
    "gathered",
    "vocab_parallel_cross_entropy",
]


def enter_training_mode() -> Any:
    """Layers built and run with gradients and plain collectives; gives the previous mode's restorer.

    DeepSpeed's default is inference, in which weights are frozen and the reduction ignores its group. The mode is a
    global of the module, read when a layer is built and at each forward.
    """
    state: Any = _layers
    previous = state.DEEPSPEED_AUTOTP_MODE
    set_autotp_mode(training=True)

    def restore() -> None:
        state.DEEPSPEED_AUTOTP_MODE = previous

    return restore


def init_communication() -> None:
    """DeepSpeed's communication on torch's existing world; its layers need it."""
    if not deepspeed.comm.is_initialized():
        with printing_as_log(logger, "DeepSpeed"):
            backend = torch.distributed.get_backend()
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def forget_mpu() -> None:
    """An engine leaves its mpu in a global, where the next engine would find it."""
    state: Any = _groups
    state.mpu = None


def gathered(parameters: Any, modifier_rank: int | None = None) -> Any:
    """Around access to whole parameters that ZeRO-3 has partitioned; does nothing to others."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
