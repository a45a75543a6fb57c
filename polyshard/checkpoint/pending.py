"""A save that goes on in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polyshard.core.context import ParallelContext
from polyshard.core.ranks import Ranks


class PendingSave:
    """An asynchronous save: training goes on, the weights that are written are those of the moment of the call."""

    def __init__(self, context: ParallelContext, work: Callable[[Ranks], Path]) -> None:
        ranks = Ranks.of(context)
        # Collectives of two threads must not meet in one group.
        group: Any = None if ranks.alone else dist.new_group(backend="gloo", timeout=_timeout(context))
        self._group = group
        self._ranks = Ranks(ranks.rank, ranks.size, group, ranks.guard)
        self._result: Path | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="polyshard-save")
        self._thread.start()

    def _run(self, work: Callable[[Ranks], Path]) -> None:
        try:
            self._result = work(self._ranks)
        except BaseException as error:  # handed to the thread that waits
            self._error = error

    def done(self) -> bool:
        """Whether this rank has finished, well or not; `wait` then returns at once."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """The directory, when it stands. Every rank calls it before the next save.

        Raises:
            CheckpointError: the save failed; what was there before is untouched.
            RankFailureError: a rank died.
        """
        self._thread.join()
        if self._group is not None:
            group, self._group = self._group, None
            if self._error is None:
                dist.destroy_process_group(group)
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


def _timeout(context: ParallelContext) -> timedelta:
    return timedelta(seconds=context.group_timeout)
