"""Wait until gloo's worker threads have released the tensors of finished collectives.

A collective is finished before its worker thread releases the tensors. If Python knows them, the release needs the
global interpreter lock. Up to Python 3.13, a thread that asks for the lock while the interpreter shuts down is ended,
which C++ answers with "terminate called without an active exception" (SIGABRT). A barrier does not prevent this:
another worker thread may run it. On a loaded machine, one training run in a hundred ended so, after its last step.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from polyshard.core.ranks import Ranks


def drain_all(ranks: Ranks) -> None:
    """Wait until no gloo worker thread of any group holds a tensor. A collective over all ranks."""
    groups = {group.group_name: group for group in distributed_c10d._world.pg_map if _gloo(group) is not None}
    everywhere = [set(names) for names in ranks.gather(sorted(groups))]
    for name, group in groups.items():  # in order of creation, which is the same on all ranks
        if ranks.is_single or all(name in everywhere[rank] for rank in dist.get_process_group_ranks(group)):
            drain(group)


def drain(group: dist.ProcessGroup) -> None:
    """Wait until no worker thread of a gloo group holds a tensor. A collective over the group; others return at once.

    All-reduces with a callback are repeated until each thread of each rank has run one: the threads are then past
    what they did before. They can hold only the tensors and callbacks of these all-reduces, whose reference counts show
    when they are released.

    Raises:
        TimeoutError: a thread holds on to its tensors beyond the group's timeout.
    """
    backend = _gloo(group)
    if backend is None:
        return
    deadline = time.monotonic() + backend.options._timeout.total_seconds()
    held: list[Any] = []
    seen: set[int] = set()
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MIN
    fewest = 0  # threads seen on any rank
    while fewest < backend.options._threads:
        _check(deadline)
        fewest = _reduce_with_callbacks(backend, seen, held, options)
    while any(count > _UNSHARED for count in _reference_counts(held)):
        _check(deadline)
        time.sleep(0.001)


def _reduce_with_callbacks(backend: Any, seen: set[int], held: list[Any], options: dist.AllreduceOptions) -> int:
    """Run as many all-reduces as there are threads; return the smallest number of threads seen before, of all ranks.

    What the works may hold is appended to `held`.
    """
    tensors = [torch.tensor(len(seen)) for _ in range(backend.options._threads)]
    works = [backend.allreduce([tensor], options) for tensor in tensors]
    callbacks = [_Callback(seen) for _ in works]
    held += [*tensors, *callbacks]
    for work, callback in zip(works, callbacks, strict=True):
        work.get_future().add_done_callback(callback)
    for work in works:
        work.wait()
    return int(tensors[-1])


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("a worker thread of gloo has not released its tensors within the group's timeout")


def _reference_counts(held: list[Any]) -> list[int]:
    return [sys.getrefcount(each) for each in held]


class _Callback:
    """Adds the thread that calls it, unless the work was done before the callback was added to it."""

    def __init__(self, seen: set[int]) -> None:
        self._seen, self._adding = seen, threading.get_ident()

    def __call__(self, _: Any) -> None:
        if threading.get_ident() != self._adding:
            self._seen.add(threading.get_ident())
            time.sleep(0.001)  # leaves the next work to another thread


_UNSHARED = _reference_counts([torch.zeros(1)])[0]  # the count of an object that only `held` refers to


def _gloo(group: dist.ProcessGroup) -> Any:
    """The backend that runs a group's collectives of CPU tensors on worker threads; None if there is none."""
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:  # no backend for CPU tensors
        return None
    return backend if isinstance(backend, dist.ProcessGroupGloo) else None
