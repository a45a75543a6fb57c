"""Process groups for axes of one rank, which some libraries require."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from polyshard.adapters.shared.devices import default_backend
from polyshard.adapters.shared.draining import drain, drain_all
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.errors import AdapterError
from polyshard.core.parallel_layout import Axis
from polyshard.core.ranks import Ranks


def group_context(context: ParallelContext) -> GroupContext:
    """Return the context as a `GroupContext`, which adoption needs.

    Raises:
        AdapterError: the context is of another type.
    """
    if not isinstance(context, GroupContext):
        raise AdapterError(
            f"cannot adopt {type(context).__name__}. Pass a polyshard.GroupContext with its axes' collectives"
        )
    return context


def with_groups(context: GroupContext, names: Sequence[Axis]) -> GroupContext:
    """Return the context with a process group on each of these axes, created for axes of one rank.

    Without torch.distributed, a default process group of one rank is created. The context's `on_shutdown` destroys the
    new groups.
    """
    undo: list[Callable[[], None]] = []
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group(default_backend(context.device), store=dist.HashStore(), rank=0, world_size=1)
        undo.append(_destroy_world)
    axes = dict(context.axes)
    for name in names:
        axis = context.axis(name)
        if axis.group is None:
            group: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
            axes[name] = dataclasses.replace(axis, group=group)
            if not alone:
                undo.append(partial(destroy, group))
    return dataclasses.replace(context, axes=axes, on_shutdown=(*undo, *context.on_shutdown))


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether a group still exists."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        return False
    return True


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy a group, unless all groups are destroyed already. A collective over the group.

    References that others hold keep its worker threads running; they may not hold tensors then (draining.py).
    """
    if dist.is_initialized():
        if sys.exc_info()[1] is None:  # else the other ranks may not come
            drain(group)
        dist.destroy_process_group(group)


def _destroy_world() -> None:
    drain_all(Ranks())
    dist.destroy_process_group()
