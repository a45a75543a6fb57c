"""Discovery of adapters through the entry-point group `polyshard.adapters`. Each is imported on first use.

Built-in adapters are registered in the same way as those of other packages.
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
    """Return the names of all registered adapters, whether or not their libraries are installed.

    Examples:
        >>> "torch" in adapter_names() and "vllm" in adapter_names()
        True
    """
    return tuple(sorted(_entry_points()))


def load_adapter(name: str) -> Adapter:
    """Return the adapter with the given name.

    Raises:
        AdapterError: no adapter has that name; the message lists the available ones.
        MissingDependencyError: the adapter's library is not installed; the message contains the command that
            installs it.

    Examples:
        >>> load_adapter("megatron").requirement.title
        'Megatron-Core'
    """
    points = _entry_points()
    if name not in points:
        available = ", ".join(sorted(points)) or "none (install polyshard with pip, so that its entry points are found)"
        raise AdapterError(
            f"The adapter is unknown: got {name!r}, expected one of {available}. Install a built-in adapter's library "
            f"with pip install 'polyshard[NAME]', or install a package that registers the adapter in the entry-point "
            f"group {GROUP!r}."
        )
    return points[name].load()


def installed_adapters() -> Iterator[Adapter]:
    """Yield the adapters whose libraries are installed. An adapter that cannot be loaded is skipped with a warning."""
    for name in adapter_names():
        try:
            adapter = load_adapter(name)
        except Exception as error:  # a broken package must not affect users of the other adapters
            logger.warning("Adapter %s is skipped because it cannot be loaded: %s", name, error)
            continue
        if adapter.requirement.version() is not None:
            yield adapter
