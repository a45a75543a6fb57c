"""Requests to a remote file system that a save makes, on object stores as on file systems with directories."""

from __future__ import annotations

from pathlib import Path

from polyshard.checkpoint.location import file_system, key


def remote_files(directory: Path) -> list[str]:
    """Return the relative paths of all files below a remote directory."""
    root = key(directory).rstrip("/")
    return [name.removeprefix(root).lstrip("/") for name in keys_below(directory)]


def write_file(path: Path, text: str) -> None:
    """Write a small file in one request, so that it is there completely or not at all."""
    make_parent(path)
    file_system(path).pipe_file(key(path), text.encode())


def make_parent(path: Path) -> None:
    """Create a file's directory. Object stores have none, and s3fs would create the bucket instead."""
    fs = file_system(path)
    if not fs.async_impl:
        fs.makedirs(key(path.parent), exist_ok=True)


def keys_below(directory: Path) -> list[str]:
    """Return the keys of all files below a remote directory."""
    fs = file_system(directory)
    return fs.find(key(directory)) if fs.exists(key(directory)) else []


def refresh(path: Path) -> None:
    """Forget cached listings."""
    file_system(path).invalidate_cache()
