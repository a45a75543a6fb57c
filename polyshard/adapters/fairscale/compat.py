"""All that depends on FairScale's version; written for 0.4.13, its last. Imported on first use of FairScale."""

from __future__ import annotations

from typing import Any

from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.nn.model_parallel import initialize
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from fairscale.optim.oss import OSS
from torch import nn

_state: Any = initialize

__all__ = [
    "OSS",
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "get_group",
    "set_group",
    "sharded_data_parallel",
    "vocab_parallel_cross_entropy",
]


def get_group() -> Any:
    """The one tensor-parallel group that FairScale's layers read at every forward and backward."""
    return _state._MODEL_PARALLEL_GROUP


def set_group(group: Any) -> None:
    """FairScale has no setter: `initialize_model_parallel` makes groups of its own, and prints."""
    _state._MODEL_PARALLEL_GROUP = group


def sharded_data_parallel(model: nn.Module, optimizer: OSS, group: Any) -> ShardedDataParallel:
    """ShardedDataParallel that keeps its own gradients on a group that is not the world.

    sharded_ddp.py:431 compares `dst_rank`, a rank within the group, with `_global_rank`, and drops the gradients that
    this rank owns where the two differ: silently wrong training with any tensor parallelism beside it. The attribute is
    read nowhere else. `tests/adapters/test_fairscale.py` fails when FairScale no longer needs this.
    """
    sharded = ShardedDataParallel(model, optimizer, process_group=group)
    sharded._global_rank = sharded._rank
    return sharded
