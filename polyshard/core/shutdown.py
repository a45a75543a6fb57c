"""The end of a context."""

from __future__ import annotations

from polyshard.core.context import ParallelContext
from polyshard.core.errors import RankFailureError


def shut_down(context: ParallelContext) -> None:
    """Wait for the work in the background, and undo the initialization; then raise the first error of that work.

    Raises:
        RankFailureError: a rank failed. Nothing is undone, because that would wait for the rank.
    """
    error: Exception | None = None
    for work in tuple(context.background):
        try:
            work.wait()
        except RankFailureError:
            raise
        except Exception as failure:
            error = error or failure
    for undo in context.on_shutdown:
        undo()
    if error is not None:
        raise error
