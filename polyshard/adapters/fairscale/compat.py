"""All code that depends on the version of FairScale, for 0.4.13, its last. Imported on first use of FairScale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.nn.model_parallel import initialize
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.optim.oss import OSS
from torch import nn

from polyshard.adapters.shared.options import checked_options, parameters_of

_state: Any = initialize

__all__ = [
    "OSS",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "get_group",
    "remove_hooks",
    "set_group",
    "sharded_data_parallel",
    "sharded_options",
    "vocab_parallel_cross_entropy",
]


def get_group() -> Any:
    """Return the global tensor-parallel group that FairScale's layers read in every forward and backward pass."""
    return _state._MODEL_PARALLEL_GROUP


def set_group(group: Any) -> None:
    """Set the global tensor-parallel group; FairScale's `initialize_model_parallel` creates its own groups."""
    _state._MODEL_PARALLEL_GROUP = group


def sharded_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return checked options of ShardedDataParallel.

    Raises:
        ConfigurationError: an unknown name, or one that the engine sets itself.
    """
    # reduce_fp16 would round the gradients, which polyshard.Precision decides; without the synchronization at the start
    # ranks may start from different weights.
    reserved = {"module", "sharded_optimizer", "process_group", "reduce_fp16", "sync_models_at_startup"}
    return checked_options("ddp_options", options, parameters_of(ShardedDataParallel, reserved))


def sharded_data_parallel(
    model: nn.Module, optimizer: OSS, group: Any, options: Mapping[str, Any], *, sync_models: bool
) -> ShardedDataParallel:
    """Return ShardedDataParallel that keeps the gradients it owns on a group that is not the world.

    It reduces the gradients of the optimizer's parameters; `sync_models` gives every rank all weights of the first one.

    sharded_ddp.py:431 compares `dst_rank`, a rank within the group, with `_global_rank`, and drops the gradients that
    this rank owns if the two differ. Training with tensor parallelism would then be silently wrong. The attribute is
    read nowhere else. `tests/adapters/test_fairscale.py` fails when FairScale no longer needs this.
    """
    sharded = ShardedDataParallel(model, optimizer, process_group=group, sync_models_at_startup=sync_models, **options)
    sharded._global_rank = sharded._rank
    return sharded


def remove_hooks(wrapped: ShardedDataParallel) -> None:
    """Let a ShardedDataParallel reduce no gradients of later backward passes, which its hooks outlive it to do."""
    for hook in wrapped._grad_hooks:
        hook.remove()
    wrapped._grad_hooks.clear()
