"""Where a checkpoint lies: a local path, or a URL of a remote file system that fsspec knows.

A URL is held as a `UPath` of the package universal-pathlib, which has the methods of `pathlib.Path`. Code that reads
names, small files and listings is therefore the same for both; `is_remote` tells where they differ.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from polyshard.core.errors import CheckpointError, MissingDependencyError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]+)?://")
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:$")


def as_path(location: str | Path | Any) -> Path:
    """Return a local `Path`, or for a URL a `UPath`, which has the same methods.

    Cached listings of a remote directory are forgotten, because other processes write it, too.

    Args:
        location: a path, a URL such as `s3://bucket/runs/a`, or a `UPath` with storage options of its own.

    Raises:
        CheckpointError: a URL lacks a slash, such as one that was made a `pathlib.Path`; or fsspec does not know it.
        MissingDependencyError: the package of the file system is not installed.

    Examples:
        >>> as_path("runs/a"), as_path("file:///runs/a")
        (PosixPath('runs/a'), PosixPath('/runs/a'))
    """
    if isinstance(location, Path) and not hasattr(location, "fs"):
        _check_slashes(location, "was made a pathlib.Path, which drops a slash of it. Pass a str")
        return location
    if isinstance(location, str) and location.startswith("file://"):
        return Path(location.removeprefix("file://"))
    if isinstance(location, str) and not _URL.match(location):
        _check_slashes(Path(location), "lacks a slash. Write ://")
        return Path(location)
    path = _upath(location)
    path.fs.invalidate_cache()
    return cast(Path, path)


def _check_slashes(path: Path, what: str) -> None:
    """Raise `CheckpointError` for s3:/bucket, which would be a local directory named `s3:`."""
    if path.parts and _COLLAPSED.match(path.parts[0]) and not Path(path.parts[0]).exists():
        raise CheckpointError(f"{path} is a URL that {what}.")


def is_remote(path: Path) -> bool:
    """Return whether `as_path` returned a path of a remote file system."""
    return hasattr(path, "fs")


def local_path(location: str | Path | Any, argument: str) -> Path:
    """Return a local `Path`.

    Raises:
        CheckpointError: it is a URL of a remote file system.
    """
    path = as_path(location)
    if is_remote(path):
        raise CheckpointError(
            f"{argument} must be local: got {path}. Copy it first, with polyshard.download_checkpoint."
        )
    return path


def file_system(path: Path) -> Any:
    """Return the fsspec file system of a remote path."""
    return cast(Any, path).fs


def key(path: Path) -> str:
    """Return the path within its remote file system, such as `bucket/runs/a`."""
    return cast(Any, path).path


def _upath(location: Any) -> Any:
    try:
        from upath import UPath
    except ImportError:
        raise MissingDependencyError(
            f"{location} is a URL, which needs the packages fsspec and universal-pathlib. "
            "Install them with: pip install 'polyshard[remote]'"
        ) from None
    try:
        path = location if isinstance(location, UPath) else UPath(location)
        _ = path.fs
    except ImportError as error:
        raise MissingDependencyError(f"{location} needs another package: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{location} is not a URL that fsspec knows: {error}") from None
    return path
