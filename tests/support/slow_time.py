"""Files of slow tests that begin only while a run has time for them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest

from support.paths import ROOT

REASON = "no time is left for this file's slow tests (make test-slow)"
MARGIN = 1.5  # of a file's recorded seconds, on a slower machine


class TimeForSlow:
    """Skips files of slow tests that a run has no time for. A file that has begun is finished.

    Args:
        budget: seconds of the whole run.
        seconds: those that each file took in a recorded run.
    """

    def __init__(self, budget: float, seconds: Mapping[str, float]) -> None:
        self.end = time.monotonic() + budget
        self.seconds = seconds
        self.begins: dict[str, bool] = {}  # by file

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("slow") is None:
            return
        name = file_of(item)
        if name not in self.begins:
            self.begins[name] = time.monotonic() + MARGIN * self.seconds.get(name, 60.0) <= self.end
        if not self.begins[name]:
            pytest.skip(REASON)


def file_of(item: pytest.Item) -> str:
    """Return the path of a test's file within `tests`."""
    return item.path.relative_to(ROOT / "tests").as_posix()


def turned(names: list[str], start: int) -> list[str]:
    """Return names rotated by `start`.

    Examples:
        >>> turned(["a", "b", "c"], 4)
        ['b', 'c', 'a']
    """
    first = start % len(names) if names else 0
    return names[first:] + names[:first]
