"""DeepSpeed's layers on the process groups of a context, and the context as DeepSpeed's `mpu`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from polyshard.adapters.shared.groups import group_context, with_groups
from polyshard.core.context import GroupContext, ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError


def adopt(context: ParallelContext, linear: Any) -> GroupContext:
    """Return a context with DeepSpeed's layers, in training mode until shutdown, on the process groups of `context`."""
    from polyshard.adapters.deepspeed import compat

    adopted = with_groups(group_context(context), ("tensor", "data", "expert_replica"))
    compat.init_communication()
    restore = compat.enter_training_mode()
    return dataclasses.replace(adopted, linear=linear, on_shutdown=(restore, *adopted.on_shutdown))


class Mpu:
    """The `mpu` for `deepspeed.initialize`. It must not define `initialize_sequence_parallel`."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def get_model_parallel_group(self) -> Any:
        """Return the group of the tensor axis, over which norms are summed."""
        return self._context.get_tensor_parallel_group()

    def get_model_parallel_rank(self) -> int:
        """Return this rank's position on the tensor axis."""
        return self._context.get_tensor_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        """Return the size of the tensor axis."""
        return self._context.get_tensor_parallel_world_size()

    def get_data_parallel_group(self) -> Any:
        """Return the group of the replicas, over which ZeRO shards."""
        return replica_axis(self._context).group

    def get_data_parallel_rank(self) -> int:
        """Return this rank's position among the replicas."""
        return replica_axis(self._context).rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of replicas."""
        return replica_axis(self._context).size


def check_accelerator(device: torch.device) -> None:
    """Raise `ConfigurationError` if DeepSpeed would move the model to another device."""
    from polyshard.adapters.deepspeed.compat import accelerator

    found = accelerator()
    if found != device.type:
        raise ConfigurationError(
            f"DeepSpeed computes on {found} in this process, but this rank on {device}: it chooses the device "
            f"when it is imported. Start with DS_ACCELERATOR={device.type}, or initialize(..., device={found!r})"
        )
