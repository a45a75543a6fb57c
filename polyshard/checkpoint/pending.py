"""Asynchronous saves."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polyshard.core.context import ParallelContext
from polyshard.core.ranks import Ranks

logger = logging.getLogger(__name__)


class PendingSave:
    """A save that runs in the background. It writes the weights as they were when the save was requested.

    Examples:
        >>> context = ps.initialize("torch")
        >>> pending = ps.save_checkpoint(torch.nn.Linear(2, 2), "out", context, config={}, asynchronous=True)
        >>> pending.wait()
        PosixPath('out')
    """

    def __init__(self, context: ParallelContext, work: Callable[[Ranks], Path]) -> None:
        ranks = Ranks.of(context)
        # Collectives of two threads must not share a process group.
        group: Any = None if ranks.is_single else dist.new_group(backend="gloo", timeout=_timeout(context))
        self._group = group
        self._result: Path | None = None
        self._error: BaseException | None = None
        of_save = Ranks(ranks.rank, ranks.size, group, ranks.guard)
        self._context = context
        context.background.append(self)
        self._thread = threading.Thread(target=self._run, args=(work, of_save), name="polyshard-save")
        self._thread.start()
        # The interpreter waits for threads only after it has closed all thread pools, which a save needs.
        threading._register_atexit(partial(_join, weakref.ref(self._thread)))  # pyrefly: ignore

    def _run(self, work: Callable[[Ranks], Path], ranks: Ranks) -> None:
        try:
            self._result = work(ranks)
        except BaseException as error:  # raised by `wait`; the script may end without it
            logger.error("a save failed: %s", error)
            self._error = error

    def done(self) -> bool:
        """Return whether this rank has finished, with or without success; `wait` then does not block."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the save, with or without success."""
        self._thread.join()

    def wait(self) -> Path:
        """Wait for the save and return its directory. Every rank must call it.

        The next save, `shutdown` and the end of the script wait, too. `shutdown` also raises the error.

        Raises:
            CheckpointError: the save failed; the previous checkpoint is untouched.
            RankFailureError: a rank crashed, hung, or cannot be reached.
        """
        self._thread.join()
        if self in self._context.background:
            self._context.background.remove(self)
        if self._group is not None:
            group, self._group = self._group, None
            if self._error is None:
                dist.destroy_process_group(group)  # the last reference: its worker threads end here
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


def _join(thread: weakref.ref[threading.Thread]) -> None:
    running = thread()
    if running is not None:
        running.join()


def _timeout(context: ParallelContext) -> timedelta:
    return timedelta(seconds=context.group_timeout)
