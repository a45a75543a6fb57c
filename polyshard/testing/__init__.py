"""Tools for testing adapters and models: the conformance suite, and functions on several ranks."""

from typing import TYPE_CHECKING, Any

from polyshard.launch.ranks import RankError, run_ranks

if TYPE_CHECKING:
    from polyshard.testing.suite import AdapterSuite

__all__ = ["AdapterSuite", "RankError", "run_ranks"]


def __getattr__(name: str) -> Any:
    if name == "AdapterSuite":  # needs pytest, which processes of ranks do not import
        from polyshard.testing.suite import AdapterSuite

        return AdapterSuite
    raise AttributeError(f"module 'polyshard.testing' has no attribute {name!r}")
