"""Atomic publication of a checkpoint on a file system without rename, such as an object store.

The manifest is written last: a directory with a manifest is a checkpoint. While a save writes a directory, `MARKER`
lies in it, so that a directory with the marker and without a manifest is not mistaken for one of another program.

A directory that holds a checkpoint already is not written to at first. The new files go to a hidden directory beside
it, which becomes a checkpoint with its manifest. They are then copied by the server. The marker names the hidden
directory, and a reader takes it while the copy is incomplete (`published`). Files that are not part of the old
checkpoint are kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from polyshard.checkpoint.location import file_system, key
from polyshard.checkpoint.manifest import MANIFEST, Manifest, manifest_text, missing_part, read_manifest
from polyshard.checkpoint.others import listed_files, refuse_other_weights
from polyshard.core.errors import CheckpointError

logger = logging.getLogger(__name__)

MARKER = ".polyshard-saving"
_THREADS = 8


def begin_upload(target: Path, name: str) -> Path:
    """Return the directory into which the files of a save go; `target` itself unless it holds a checkpoint.

    Args:
        target: the checkpoint's directory.
        name: name of a hidden directory beside it.
    """
    _refresh(target)
    if _is_written(target):
        return target.parent / name
    if _files(target):
        logger.warning("removing what a killed save left in %s", target)
    _mark(target)
    _clear(target)
    return target


def upload(folder: Path, files: list[str], prefix: Path) -> None:
    """Copy files of a local folder below a remote directory."""
    fs = file_system(prefix)

    def put(name: str) -> None:
        _make_parent(prefix / name)
        fs.put_file(str(folder / name), key(prefix / name))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(put, files))


def commit(prefix: Path, target: Path, manifest: Manifest) -> None:
    """Make the files below `prefix` the checkpoint `target`.

    Raises:
        CheckpointError: a file is missing below `prefix`: the ranks do not see the same file system. Or there are
            other weights, which would lie beside those of the checkpoint.
    """
    _refresh(prefix)
    problem = missing_part(prefix, manifest)
    if problem is not None:
        raise CheckpointError(
            f"{prefix} is incomplete after all ranks have written: {problem}. The ranks must see the same file system."
        )
    old: set[str] = set()
    if prefix != target:
        present = set(remote_files(target))
        old = _old(target) & present
        refuse_other_weights(target, present - old - {MANIFEST, MARKER, *manifest.files})
    write_file(prefix / MANIFEST, manifest_text(manifest))
    if prefix != target:
        _replace(prefix, target, manifest, old)
    _discard(target / MARKER)
    for kept in _beside(target):
        _clear(kept)


def withdraw(prefix: Path) -> None:
    """Remove what a failed save has uploaded; a finished checkpoint stays. What cannot be removed is no checkpoint."""
    try:
        _refresh(prefix)
        if not (prefix / MANIFEST).is_file():
            _clear(prefix)
            _discard(prefix / MARKER)
    except Exception as error:  # the file system cannot be reached, which the save's own error tells
        logger.warning("%s holds files of a failed save, which the next save removes: %s", prefix, error)


def published(path: Path) -> Path:
    """Return the directory of the checkpoint `path`: itself, or a new one beside it that was not copied completely.

    Raises:
        CheckpointError: a save to it has not finished.
    """
    _refresh(path)
    if (path / MANIFEST).is_file() or not (path / MARKER).is_file():
        return path
    kept = _copied(path)
    if kept is not None and (kept / MANIFEST).is_file():
        logger.warning("a save was killed while replacing %s; reading %s", path, kept)
        return kept
    raise CheckpointError(f"{path} is incomplete: a save to it is under way, or was killed. Load another checkpoint.")


def _replace(prefix: Path, target: Path, manifest: Manifest, old: set[str]) -> None:
    """Copy the files over those of the old checkpoint, which from here on is found no longer, but `prefix` is."""
    fs = file_system(target)
    _mark(target, prefix, old)
    _discard(target / MANIFEST)
    rest = [key(target / name) for name in sorted(old - {MANIFEST})]
    if rest:
        fs.rm(rest)
        _refresh(target)

    def copy(name: str) -> None:
        _make_parent(target / name)
        fs.cp_file(key(prefix / name), key(target / name))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, manifest.files))
    write_file(target / MANIFEST, manifest_text(manifest))


def _is_written(target: Path) -> bool:
    """Return whether the directory, or one beside it, must stay readable until the new checkpoint is complete."""
    if (target / MARKER).is_file() and not _complete(target):
        kept = _copied(target)
        return kept is not None and _complete(kept)
    return bool(_files(target))


def _complete(path: Path) -> bool:
    try:
        return read_manifest(path) is not None
    except CheckpointError:
        return False


def _mark(target: Path, prefix: Path | None = None, old: Collection[str] = ()) -> None:
    """Write the marker.

    Args:
        target: the checkpoint's directory.
        prefix: the directory beside it that holds the complete new checkpoint, if there is one.
        old: the files of the old checkpoint, which are being removed.
    """
    note = "A save writes this directory. Without polyshard.json it is no checkpoint."
    complete = None if prefix is None else prefix.name
    write_file(target / MARKER, json.dumps({"note": note, "complete": complete, "old": sorted(old)}) + "\n")


def _marker(target: Path) -> dict[str, Any]:
    try:
        found = json.loads((target / MARKER).read_text())
    except (ValueError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def _copied(target: Path) -> Path | None:
    """Return the directory that the marker names; its manifest is written before the marker."""
    name = _marker(target).get("complete")
    return None if name is None else target.parent / Path(name).name


def _old(target: Path) -> set[str]:
    """Return the files of the checkpoint to replace, including those that a killed replacement has left."""
    kept = _copied(target)
    return {*listed_files(target), *_marker(target).get("old", ()), *(() if kept is None else listed_files(kept))}


def remote_files(directory: Path) -> list[str]:
    """Return the relative paths of all files below a remote directory."""
    root = key(directory).rstrip("/")
    return [name.removeprefix(root).lstrip("/") for name in _files(directory)]


def write_file(path: Path, text: str) -> None:
    """Write a small file in one request, so that it is there completely or not at all."""
    _make_parent(path)
    file_system(path).pipe_file(key(path), text.encode())


def _make_parent(path: Path) -> None:
    """Create a file's directory. Object stores have none, and s3fs would create the bucket instead."""
    fs = file_system(path)
    if not fs.async_impl:
        fs.makedirs(key(path.parent), exist_ok=True)


def _files(directory: Path) -> list[str]:
    fs = file_system(directory)
    return fs.find(key(directory)) if fs.exists(key(directory)) else []


def _beside(target: Path) -> list[Path]:
    """Return the hidden directories of saves of `target`."""
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.saving-")]


def _clear(directory: Path) -> None:
    """Remove all files but the marker; the manifest first, so that what a kill leaves is no checkpoint."""
    _discard(directory / MANIFEST)
    rest = [name for name in _files(directory) if not name.endswith(f"/{MARKER}")]
    if rest:
        file_system(directory).rm(rest)
    _refresh(directory)


def _discard(path: Path) -> None:
    if path.is_file():
        file_system(path).rm_file(key(path))
        _refresh(path)


def _refresh(path: Path) -> None:
    file_system(path).invalidate_cache()
