"""Waits with an end: for one call, and for an action on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from polyshard.core.errors import CheckpointError, PolyshardError
from polyshard.core.ranks import Ranks

T = TypeVar("T")

_FIRST, _LAST = 0.002, 0.25  # seconds between two exchanges of states: the first, and the longest
_GRACE = 1.0  # seconds after the first failure in which other ranks may report theirs


class Background(Generic[T]):
    """An action that runs in a thread of its own, and its outcome.

    Args:
        action: the action.
        name: the thread's name.
    """

    def __init__(self, action: Callable[[], T], name: str) -> None:
        self.error: Exception | None = None
        self._action = action
        self._results: list[T] = []
        self._done = threading.Event()
        threading.Thread(target=self._run, name=f"polyshard-{name}", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait at most this time; return whether the action has ended."""
        return self._done.wait(seconds)

    def result(self) -> T:
        """Return what the action returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except Exception as error:
            self.error = error
        finally:
            self._done.set()


def run_within(seconds: float, action: Callable[[], T], name: str = "call") -> T:
    """Return the action's result, or raise `TimeoutError` if it has not ended after `seconds`.

    The action goes on in its thread: it must hold nothing that others wait for.

    Examples:
        >>> run_within(5.0, lambda: 1 + 1)
        2
    """
    running = Background(action, name)
    if not running.wait(seconds):
        raise TimeoutError(f"no answer within {seconds:g} s")
    return running.result()


def run_in_step(ranks: Ranks, action: Callable[[], T], what: str, kind: type[PolyshardError] = CheckpointError) -> T:
    """Run a long action on every rank; if it fails on any, raise an error that names the rank on all. A collective.

    While the action runs in a thread, the ranks tell each other at short intervals how far they are. No rank waits
    longer than one interval for another, so that the action may take longer than the timeout of a collective, and a
    rank whose own part waits for something outside the job is not taken for one that failed.

    Args:
        ranks: the ranks.
        action: this rank's part. It must not communicate with other ranks through their common groups, and must end by
            itself.
        what: the beginning of the message, such as "the sync failed".
        kind: class of the error, unless all ranks that failed raised the same `PolyshardError`.

    Returns:
        The result of this rank's `action`.

    Raises:
        RankFailureError: a rank died.

    Examples:
        >>> run_in_step(Ranks(), lambda: 1 + 1, "the addition failed")
        2
    """
    if ranks.is_single:
        return ranks.run_on_all(action, what, kind)
    running = Background(action, "step")
    pause = _FIRST
    while True:
        ended = running.wait(pause)
        states = ranks.gather((ended, running.error is not None))
        failed = any(state[1] for state in states)
        if failed:
            running.wait(_GRACE)
        if failed or all(state[0] for state in states):
            break
        pause = min(_LAST, 1.5 * pause)
    ranks.raise_on_all(running.error, what, kind)
    return running.result()
