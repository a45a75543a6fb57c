"""The library behind an adapter: its installed version, its supported versions, and how to install it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from polyshard.core.errors import MissingDependencyError, UnsupportedVersionError


class UntestedVersionWarning(UserWarning):
    """A library in a version outside the supported range. The warning is issued once, at the first use.

    Examples:
        >>> import warnings
        >>> warnings.simplefilter("ignore", UntestedVersionWarning)  # accept an untested version
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """The library that an adapter needs, and its supported versions.

    `pyproject.toml`, `polyshard doctor` and docs/how-to/write-an-adapter.md take the supported range from here.

    Attributes:
        title: the library's name.
        module: the module that is imported.
        distributions: the packages that contain the module; the first one that is installed defines the version.
        tested: the versions that polyshard has been run with.
        install: the command that installs the library.
        supported: the range of supported versions, such as `>=0.16,<0.20`; empty for any.
        refused: pairs of a range and a reason: versions that are known to compute something wrong without an error.

    Examples:
        >>> names = {"title": "NumPy", "module": "numpy", "distributions": ("numpy",)}
        >>> numpy = Requirement(**names, tested=("2.3.0",), install="pip install numpy", supported=">=2,<3")
        >>> numpy.supports("2.4.0"), numpy.supports("1.26.4")
        (True, False)
    """

    title: str
    module: str
    distributions: tuple[str, ...]
    tested: tuple[str, ...]
    install: str
    supported: str = ""
    refused: tuple[tuple[str, str], ...] = ()

    def version(self) -> str | None:
        """Return the installed version, or None if the library is not installed. Nothing is imported."""
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
        """Check that the library can be used. Warn, once, if its version is outside the supported range.

        Raises:
            MissingDependencyError: the library is not installed; the message contains the command that installs it.
            UnsupportedVersionError: this version is known to compute something wrong.
        """
        found = self.version()
        if found is None:
            raise MissingDependencyError(f"{self.title} is not installed. Install it with: {self.install}")
        _check_version(self, found)

    def refusal(self, found: str) -> str | None:
        """Return why a version is refused, or None if it is accepted."""
        return next((reason for versions, reason in self.refused if _within(found, versions)), None)

    def supports(self, found: str) -> bool:
        """Return whether a version is in the supported range; an unparsable version is in none."""
        return _within(found, self.supported)


@cache  # so that each warning is issued once per process
def _check_version(requirement: Requirement, found: str) -> None:
    reason = requirement.refusal(found)
    if reason is not None:
        raise UnsupportedVersionError(
            f"{requirement.title} {found} is unsupported: {reason}. Install a version in {requirement.supported}."
        )
    if not requirement.supports(found):
        warnings.warn(
            f"{requirement.title} {found} is untested: polyshard supports {requirement.supported} and is tested with "
            f"{', '.join(requirement.tested)}.",
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
