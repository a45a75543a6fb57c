"""Whether a served model's weights may be used: a half-updated model refuses to compute."""

from __future__ import annotations

from collections.abc import Callable

from polyshard.core.errors import WeightSyncError


class WeightGuard:
    """Asked by every forward.

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

    def accept(self, version: str, watch: Callable[[], str | None] | None = None) -> None:
        """The weights are whole again.

        Args:
            version: of the weights.
            watch: asked before each forward, where the trainer's own memory is served: why it may not be used now.
        """
        self.version, self._problem, self._watch = version, None, watch

    def check(self) -> None:
        """Raise `WeightSyncError` where the weights may not be used."""
        problem = self.problem
        if problem is not None:
            raise WeightSyncError(f"this engine refuses to generate: {problem}. A complete weight update mends it")
