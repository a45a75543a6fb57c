"""The library behind an adapter: whether it is installed, and how to install it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from polyshard.core.errors import MissingDependencyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """What an adapter needs.

    Attributes:
        title: the library's name.
        module: what is imported.
        distributions: packages that bring it; the first one found gives the version.
        tested: versions that polyshard has been run with.
        install: the command that installs it.
    """

    title: str
    module: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    install: str

    def version(self) -> str | None:
        """The version installed; None without it. Nothing is imported."""
        parent, _, child = self.module.rpartition(".")
        if find_spec(parent or child) is None or find_spec(self.module) is None:
            return None
        for distribution in self.distributions:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
        return "unknown"

    def require(self) -> None:
        """Raise `MissingDependencyError`, with the command that installs it, where the library is missing."""
        if self.version() is None:
            raise MissingDependencyError(f"{self.title} is not installed: {self.install}")
