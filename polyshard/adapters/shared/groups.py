"""Process groups for axes of one rank, which some libraries require."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

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
            group: Any = group_of([dist.get_rank()])
            axes[name] = dataclasses.replace(axis, group=group)
            if not alone:
                undo.append(partial(destroy, group))
    return dataclasses.replace(context, axes=axes, on_shutdown=(*undo, *context.on_shutdown))


def group_of(ranks: Sequence[int], timeout: float | None = None) -> dist.ProcessGroup:
    """Return a new process group, with a timeout in seconds. Its ranks call this, and no others.

    `torch.distributed.new_group` with local synchronization names a group after its ranks and the number of existing
    groups. After another group was destroyed, this name may be that of an existing group, which torch refuses, or of a
    destroyed one: a rank then reads its address from the store, and waits there without end. Here the name counts the
    groups that these ranks have created.
    """
    world = distributed_c10d._get_default_group()
    named, store = distributed_c10d._world.pg_map[world]
    backend = dist.Backend(named)
    members, rank = sorted(ranks), dist.get_rank()
    listed = hashlib.sha1("_".join(map(str, members)).encode(), usedforsecurity=False).hexdigest()
    name = f"polyshard:{listed}:{store.add(f'polyshard/groups/{listed}/{rank}', 1)}"
    made: Any = distributed_c10d._new_process_group_helper(
        len(members),
        members.index(rank),
        members,
        backend,
        store,
        distributed_c10d.GroupName(name),
        timeout=distributed_c10d._get_default_timeout(backend) if timeout is None else timedelta(seconds=timeout),
        device_id=world.bound_device_id,
    )
    distributed_c10d._world.pg_group_ranks[made[0]] = {member: place for place, member in enumerate(members)}
    return made[0]


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
