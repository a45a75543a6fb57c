"""The library behind an adapter: whether it is installed, in which versions it is supported, how to install it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from polyshard.core.errors import MissingDependencyError, UnsupportedVersionError


class UntestedVersionWarning(UserWarning):
    """A library of a version outside the supported range; given once, at its first use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """What an adapter needs.

    `pyproject.toml`, `polyshard doctor` and docs/how-to/write-an-adapter.md take the supported range from here.

    Attributes:
        title: the library's name.
        module: what is imported.
        distributions: packages that bring it; the first one found gives the version.
        tested: versions that polyshard has been run with.
        install: the command that installs it.
        supported: range of versions, such as `>=0.16,<0.20`; empty for any.
        refused: pairs of a range and the reason: versions in which something is known to be wrong without a word.
    """

    title: str
    module: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    install: str
    supported: str = ""
    refused: tuple[tuple[str, str], ...] = ()

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
        """Check that the library can be used; a version outside the supported range gives a warning, once.

        Raises:
            MissingDependencyError: it is not installed; the message holds the command that installs it.
            UnsupportedVersionError: something is known to be wrong in this version.
        """
        found = self.version()
        if found is None:
            raise MissingDependencyError(f"{self.title} is not installed: {self.install}")
        _check_version(self, found)

    def refusal(self, found: str) -> str | None:
        """Why a version is refused; None if it is not."""
        return next((reason for versions, reason in self.refused if _within(found, versions)), None)

    def supports(self, found: str) -> bool:
        """Whether a version is in the supported range; an unknown one is not."""
        return _within(found, self.supported)


@cache  # once per process, whatever asks
def _check_version(requirement: Requirement, found: str) -> None:
    reason = requirement.refusal(found)
    if reason is not None:
        raise UnsupportedVersionError(
            f"{requirement.title} {found} is refused: {reason}. Install a version in {requirement.supported}"
        )
    if not requirement.supports(found):
        warnings.warn(
            f"polyshard supports {requirement.title} {requirement.supported}: got {found}, which it has not been "
            f"tested with. Tested: {', '.join(requirement.tested)}",
            UntestedVersionWarning,
            stacklevel=4,
        )


def _within(found: str, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return Version(found) in SpecifierSet(versions, prereleases=True)
    except InvalidVersion:
        return not versions
