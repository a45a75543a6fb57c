"""The check that a served model's weights are usable: a partially updated model refuses to compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from polyshard.core.errors import WeightSyncError


def shared_memory_watch(changes: Callable[[], int], since: str) -> Callable[[], str | None]:
    """Return a function that says why an engine sharing a trainer's memory must not generate; None while it may.

    Args:
        changes: returns how often the trainer has changed its weights.
        since: the last moment when the engine was up to date, for the message.
    """
    initial = changes()
    problem = f"it shares the trainer's memory, and the trainer has changed its weights since {since}"
    return lambda: None if changes() == initial else problem


class WeightGuard:
    """The state of a served model's weights, checked in every forward and, for captured graphs, before logits.

    Attributes:
        version: version of the weights after a complete update; None for those of a checkpoint.
        failed: the time (`time.time`) of the last forward that raised; None if none did. vLLM counts the tokens of its
            requests as computed, although their KV cache was not written: these requests never end.
    """

    def __init__(self) -> None:
        self.version: str | None = None
        self.failed: float | None = None
        self._problem: str | None = None
        self._watch: Callable[[], str | None] | None = None

    @property
    def problem(self) -> str | None:
        """Why the weights must not be used; None if they may."""
        if self._problem is None and self._watch is not None:
            return self._watch()
        return self._problem

    def refuse(self, problem: str) -> None:
        """Make forward raise an error with this problem."""
        self._problem = problem

    def accept(self, version: str | None, watch: Callable[[], str | None] | None = None) -> None:
        """Allow the weights to be used again.

        Args:
            version: version of the weights; None for those of a checkpoint.
            watch: called before each forward if the trainer's memory is shared; see `shared_memory_watch`.
        """
        self.version, self._problem, self._watch = version, None, watch

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the model inside this context if the weights may be used, and note whether that fails."""
        try:
            self.check()
            yield
        except BaseException:  # also an interrupt by the user
            self.failed = time.time()
            raise

    def check(self) -> None:
        """Raise `WeightSyncError` if the weights must not be used."""
        problem = self.problem
        if problem is not None:
            raise WeightSyncError(f"this engine refuses to generate: {problem}. Complete a weight update first")
