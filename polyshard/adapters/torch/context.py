"""Process groups from torchrun's environment, or a context of one process without it."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from polyshard.adapters.shared.devices import default_backend, pick_backend, pick_device
from polyshard.adapters.shared.draining import drain_all
from polyshard.adapters.shared.groups import destroy, with_groups
from polyshard.adapters.torch.collectives import TorchCollectives
from polyshard.adapters.torch.compat import rendezvous_store
from polyshard.adapters.torch.failure import PATIENCE, RankMonitor, backend_timeout
from polyshard.adapters.torch.generation import agree_on_prefix
from polyshard.core.context import FailureGuard, GroupContext, ParallelAxis, no_guard
from polyshard.core.errors import ConfigurationError
from polyshard.core.parallel_layout import AXES, Axis, ParallelLayout
from polyshard.core.ranks import Ranks

logger = logging.getLogger(__name__)

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them

DEFAULT_TIMEOUT = 600.0  # seconds; torch's default for NCCL


def world_size_from_environment() -> int:
    """Return the number of ranks that torchrun started; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def initialize(
    layout: ParallelLayout,
    linear: Any,
    *,
    device: str | torch.device | None = None,
    backend: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> GroupContext:
    """Create the process groups of `layout`.

    Args:
        layout: the parallel layout, which must fill the world.
        linear: the linear adapter that builds the context's layers.
        device: by default this rank's GPU, else the CPU.
        backend: `nccl` or `gloo`; by default the environment variable POLYSHARD_BACKEND, else `nccl` on GPUs and `gloo`
            on the CPU. With `gloo` several ranks can share one GPU, which NCCL does not support.
        timeout: seconds after which waiting for another rank raises an error that names it.

    Raises:
        LayoutError: `layout` does not fill the world.
        ConfigurationError: torchrun's environment is incomplete, or the timeout is not positive.
    """
    if not isinstance(timeout, numbers.Real) or not timeout > 0:
        raise ConfigurationError(f"timeout must be positive seconds, got {timeout!r}")
    world_size = world_size_from_environment()
    layout.validate(world_size)
    backend = pick_backend(backend)
    where = pick_device(device, backend)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if world_size == 1 and not dist.is_initialized() and "RANK" not in os.environ:
        return GroupContext(layout=layout, device=where, linear=linear)

    undo: list[Callable[[], None]] = []
    adopted_world = dist.is_initialized()
    if not adopted_world:
        _require_environment()
    monitor = None
    if all(name in os.environ for name in _ENVIRONMENT):
        rank = int(os.environ["RANK"])
        store = rendezvous_store(timeout)
        generation = agree_on_prefix(store, rank, world_size, timeout)
        if not adopted_world:
            _start_world(
                where, backend, timeout, dist.PrefixStore(f"polyshard/world/{generation}", store), rank, world_size
            )
            undo.append(dist.destroy_process_group)
        heartbeats = dist.PrefixStore(f"polyshard/heartbeat/{generation}", _second_connection(timeout))
        monitor = RankMonitor(heartbeats, rank, world_size)
    rank = dist.get_rank()
    guard: FailureGuard = monitor.guard if monitor else no_guard
    axes: dict[Axis, ParallelAxis] = {}
    same: dict[Axis, Axis] = {}  # axes with the ranks of an earlier one
    if layout.context == 1:
        same["replica"] = "data"
    if layout.expert == 1:
        same["expert_replica"] = "replica"
    for name in AXES:
        if name in same:
            axes[name] = dataclasses.replace(axes[same[name]], name=name)
            continue
        axis, group = _make_axis(layout, name, rank, timeout, guard)
        axes[name] = axis
        if group is not None and adopted_world:  # otherwise they are destroyed with the world
            undo.append(partial(destroy, group))

    if monitor:
        monitor.peers = {name: axis.ranks for name, axis in axes.items()}

    def leave() -> None:
        failure = sys.exc_info()[1]
        if failure is None:
            with guard("world barrier"):
                drain_all(Ranks(rank, dist.get_world_size()))
        else:
            if monitor:
                monitor.report(failure)
            _wait_for_others(failure)
        if monitor:
            monitor.stop()

    context = GroupContext(
        layout=layout,
        device=where,
        linear=linear,
        axes=axes,
        rank=rank,
        guard=guard,
        group_timeout=backend_timeout(timeout),
        on_shutdown=(leave, *undo),
    )
    # A group even for one tensor-parallel rank, as in vLLM: layers of users' adapters (Megatron's) require it.
    return with_groups(context, ("tensor",))


def _wait_for_others(failure: BaseException) -> None:
    """Wait a few seconds for the other ranks: if only this rank has failed, they never reach this barrier."""
    barrier = dist.barrier(async_op=True)
    try:
        if barrier is not None:
            barrier.wait(timedelta(seconds=PATIENCE))
    except RuntimeError as error:
        logger.debug("the other ranks did not end with this one, which raised %r: %s", failure, error)


def _require_environment() -> None:
    missing = [name for name in _ENVIRONMENT if name not in os.environ]
    if missing:
        raise ConfigurationError(
            f"environment variables {', '.join(missing)} are not set. Start with torchrun --nproc-per-node N script.py"
        )


def _start_world(
    device: torch.device, backend: str | None, timeout: float, store: dist.Store, rank: int, world_size: int
) -> None:
    backend = backend or default_backend(device)
    dist.init_process_group(
        backend=backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=backend_timeout(timeout)),
        device_id=device if backend == "nccl" else None,
    )


def _second_connection(timeout: float) -> dist.Store:
    """Return a separate connection to the store; on the process group's, a blocked wait would delay the heartbeat."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=min(timeout, 30.0)),
    )


def _make_axis(
    layout: ParallelLayout, name: Axis, rank: int, timeout: float, guard: FailureGuard
) -> tuple[ParallelAxis, dist.ProcessGroup | None]:
    """Return one axis of this rank, and its group if one was created. All ranks must call this in the same order."""
    mine: tuple[int, ...] = (rank,)
    made: Any = None
    group: Any = None
    for ranks in layout.groups(name):
        if len(ranks) == 1:
            candidate = None
        elif len(ranks) == layout.world_size:
            candidate = dist.group.WORLD
        else:
            candidate = dist.new_group(list(ranks), timeout=timedelta(seconds=backend_timeout(timeout)))
            made = candidate if rank in ranks else made
        if rank in ranks:
            mine, group = ranks, candidate
    collectives = None if group is None else TorchCollectives(group=group, size=len(mine), name=name, guard=guard)
    return (
        ParallelAxis(name=name, ranks=mine, rank=mine.index(rank), group=group, collectives=collectives),
        made,
    )
