"""A local copy of a checkpoint that the command line is given by its URL."""

from __future__ import annotations

from pathlib import Path

from polyshard.checkpoint import download_checkpoint
from polyshard.checkpoint.directory import find
from polyshard.checkpoint.location import as_path, is_remote
from polyshard.checkpoint.manifest import missing_part, read_manifest


def downloaded(url: str, directory: Path) -> Path:
    """Copy a checkpoint to a local directory, unless the directory has the same manifest already.

    Raises:
        CheckpointError: the URL is a local directory, or see `download_checkpoint`.
    """
    manifest = read_manifest(directory) if directory.is_dir() else None
    if manifest is not None and is_remote(as_path(url)) and manifest == read_manifest(find(url)):
        problem = missing_part(directory, manifest)
        if problem is None:
            return directory
    return download_checkpoint(url, directory)


def local_copy(location: str, directory: Path | None, temporary: Path) -> Path:
    """Return the local directory of a model: itself, or for a URL a copy.

    Args:
        location: a directory or its URL.
        directory: the copy, which is kept, and used again if it is equal; None for `temporary`.
        temporary: a directory that does not exist yet.

    Raises:
        CheckpointError: a directory for a copy of what is local, or see `download_checkpoint`.
    """
    if directory is not None:
        return downloaded(location, directory)
    path = as_path(location)
    return downloaded(location, temporary) if is_remote(path) else path
