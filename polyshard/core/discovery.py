"""Adapters by name, found through the entry-point group `polyshard.adapters`; each is imported on first use.

Built-in adapters register there as third parties do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from polyshard.core.errors import AdapterError

if TYPE_CHECKING:
    from polyshard.core.adapter import Adapter

logger = logging.getLogger(__name__)

GROUP = "polyshard.adapters"


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def adapter_names() -> tuple[str, ...]:
    """Names of all registered adapters, whether or not their libraries are installed."""
    return tuple(sorted(_entry_points()))


def load_adapter(name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        AdapterError: no adapter has that name; the message lists those that exist.
        MissingDependencyError: its library is not installed; the message holds the command that installs it.
    """
    points = _entry_points()
    if name not in points:
        available = ", ".join(sorted(points)) or "none: install polyshard with pip, so that its entry points are found"
        raise AdapterError(
            f"unknown adapter {name!r}; available: {available}. An adapter is installed with "
            f"pip install 'polyshard[NAME]' for those that polyshard brings, or as a package that registers itself "
            f"in the entry-point group {GROUP!r}"
        )
    return points[name].load()


def installed_adapters() -> Iterator[Adapter]:
    """Yield the adapters whose libraries are installed. One that cannot be loaded is skipped with a warning."""
    for name in adapter_names():
        try:
            adapter = load_adapter(name)
        except Exception as error:  # a broken package must not stop those who do not use it
            logger.warning("adapter %s is skipped: it cannot be loaded: %s", name, error)
            continue
        if adapter.requirement.version() is not None:
            yield adapter
