"""DeepSpeed on the groups of a context, and the context as DeepSpeed's `mpu`."""

from __future__ import annotations

import dataclasses
from typing import Any

from polyshard.adapters.shared.groups import group_context, with_groups
from polyshard.core.context import GroupContext, ParallelContext, replica_axis


def adopt(context: ParallelContext, linear: Any) -> GroupContext:
    """DeepSpeed's layers, in training mode, on the groups of `context`, until it is shut down."""
    from polyshard.adapters.deepspeed import compat

    adopted = with_groups(group_context(context), ("tensor", "data"))
    compat.init_communication()
    restore = compat.enter_training_mode()
    return dataclasses.replace(adopted, linear=linear, on_shutdown=(restore, *adopted.on_shutdown))


class Mpu:
    """What `deepspeed.initialize(mpu=)` asks: six methods. `initialize_sequence_parallel` must not be among them."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def get_model_parallel_group(self) -> Any:
        """The tensor axis: norms are summed over it."""
        return self._context.get_tensor_parallel_group()

    def get_model_parallel_rank(self) -> int:
        """Position along the tensor axis."""
        return self._context.get_tensor_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor axis."""
        return self._context.get_tensor_parallel_world_size()

    def get_data_parallel_group(self) -> Any:
        """The replicas: ZeRO shards over them."""
        return replica_axis(self._context).group

    def get_data_parallel_rank(self) -> int:
        """Position among the replicas."""
        return replica_axis(self._context).rank

    def get_data_parallel_world_size(self) -> int:
        """How many replicas there are."""
        return replica_axis(self._context).size
