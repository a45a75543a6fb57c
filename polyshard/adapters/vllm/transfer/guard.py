"""Whether a served model's weights may be used: a half-updated model refuses to compute."""

from __future__ import annotations

from collections.abc import Callable

from polyshard.core.errors import WeightSyncError


def shared_memory_watch(changes: Callable[[], int], since: str) -> Callable[[], str | None]:
    """Says why an engine that shares a trainer's memory may not go on, once `changes` counts more than it does now.

    Args:
        changes: counts the trainer's changes of its weights.
        since: when the engine was last right, for the message.
    """
    now = changes()
    told = f"it shares the trainer's memory, and the trainer has changed its weights since {since}"
    return lambda: None if changes() == now else told


class WeightGuard:
    """Asked by every forward, and before logits, since a captured graph asks nothing.

    Attributes:
        version: of the weights, once an update has finished.
    """

    def __init__(self) -> None:
        self.version: str | None = None
        self._problem: str | None = None
        self._watch: Callable[[], str | None] | None = None

    @property
    def problem(self) -> str | None:
        """Why the weights may not be used; None where they may."""
        if self._problem is None and self._watch is not None:
            return self._watch()
        return self._problem

    def refuse(self, problem: str) -> None:
        """From now on forward raises."""
        self._problem = problem

    def accept(self, version: str | None, watch: Callable[[], str | None] | None = None) -> None:
        """The weights are whole again.

        Args:
            version: of the weights; None for those of a checkpoint.
            watch: asked before each forward, where the trainer's own memory is served: why it may not be used now.
        """
        self.version, self._problem, self._watch = version, None, watch

    def check(self) -> None:
        """Raise `WeightSyncError` where the weights may not be used."""
        problem = self.problem
        if problem is not None:
            raise WeightSyncError(f"this engine refuses to generate: {problem}. A complete weight update mends it")
