"""Atomic publication of a checkpoint on a file system without rename, such as an object store.

The manifest is written last: a directory with a manifest is a checkpoint. While a save writes a directory, `MARKER`
lies in it, so that a directory with the marker and without a manifest is not mistaken for one of another program.

A directory that holds a checkpoint already is not written to at first. The new files go to a hidden directory beside
it, which becomes a checkpoint with its manifest. They are then copied by the server. The marker names the hidden
directory, and a reader takes it while the copy is incomplete (`published`). Files that are not part of the old
checkpoint are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from polyshard.checkpoint.location import file_system, key
from polyshard.checkpoint.manifest import MANIFEST, FileRecord, Manifest, manifest_text, missing_part, read_manifest
from polyshard.checkpoint.others import listed_files, refuse_other_weights
from polyshard.checkpoint.remote.identity import Identity, identity
from polyshard.checkpoint.remote.ownership import (
    MARKER,
    Upload,
    check_own,
    check_unchanged,
    discard,
    mark,
    mark_incomplete,
    read_marker,
    taken_over,
    undo_late,
)
from polyshard.checkpoint.remote.requests import keys_below, make_parent, refresh, remote_files, write_file
from polyshard.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_THREADS = 8
Files = Mapping[str, FileRecord]


def begin_upload(target: Path, name: str, planned: Iterable[str]) -> Upload:
    """Return the upload of a save, in place unless `target` holds files that must stay readable.

    Args:
        target: the checkpoint's directory.
        name: name of a hidden directory beside it, of this save only.
        planned: relative paths of the weights that will be uploaded.

    Raises:
        CheckpointError: there are other weights, which would lie beside those of the checkpoint.
    """
    refresh(target)
    if _is_written(target):
        present = set(remote_files(target))
        refuse_other_weights(target, present - _old(target) - {MANIFEST, MARKER, *planned})
        return Upload(target, name, in_place=False)
    if keys_below(target):
        logger.warning("removing what a killed save left in %s, or another one is writing, which will fail", target)
    mark(target, name)
    _clear(target)
    return Upload(target, name, in_place=True)


def upload(folder: Path, files: Files, to: Upload) -> dict[str, Identity]:
    """Copy files of a local folder to the upload's directory, and return what the file system tells about each.

    Raises:
        CheckpointError: another save has taken the directory over.
    """

    def put(name: str, path: Path) -> None:
        make_parent(path)
        file_system(path).put_file(str(folder / name), key(path))

    return _write_all(files, to, to.prefix, put)


def commit(done: Upload, manifest: Manifest, written: Mapping[str, Identity]) -> None:
    """Make the uploaded files the checkpoint.

    Args:
        done: the upload, to which all ranks have uploaded their files.
        manifest: of all files.
        written: what `upload` returned on all ranks.

    Raises:
        CheckpointError: a file is missing: the ranks do not see the same file system. Or another save has written the
            same directory. Or there are other weights, which would lie beside those of the checkpoint.
    """
    prefix, target = done.prefix, done.target
    refresh(prefix)
    if done.in_place:
        check_unchanged(done, written)
    problem = missing_part(prefix, manifest)
    if problem is not None:
        raise CheckpointError(
            f"{prefix} is incomplete after all ranks have written: {problem}. The ranks must see the same file system, "
            "and no other save may write the same directory at the same time."
        )
    old: set[str] = set()
    if not done.in_place:
        present = set(remote_files(target))
        old = _old(target) & present
        refuse_other_weights(target, present - old - {MANIFEST, MARKER, *manifest.files})
    write_file(prefix / MANIFEST, manifest_text(manifest))
    if not done.in_place:
        try:
            written = _replace(done, manifest, old)
        except OSError:
            check_own(done)  # else the other save has removed the files
            raise
    try:
        check_unchanged(done, written)  # again: what arrives from here on, its own save sees beside a manifest
    except CheckpointError:
        mark_incomplete(done)
        raise
    discard(target / MARKER)
    for kept in _beside(target):
        _clear(kept)


def withdraw(failed: Upload) -> None:
    """Remove what a failed save has uploaded; a finished checkpoint stays, and so does what another save writes."""
    prefix = failed.prefix
    try:
        refresh(prefix)
        if not (prefix / MANIFEST).is_file() and not (failed.in_place and taken_over(failed)):
            _clear(prefix)
            discard(prefix / MARKER)
    except Exception as error:  # the file system cannot be reached, which the save's own error tells
        logger.warning("%s holds files of a failed save, which the next save removes: %s", prefix, error)


def published(path: Path) -> Path:
    """Return the directory of the checkpoint `path`: itself, or a new one beside it that was not copied completely.

    Raises:
        CheckpointError: a save to it has not finished.
    """
    refresh(path)
    if (path / MANIFEST).is_file() or not (path / MARKER).is_file():
        return path
    kept = _copied(path)
    if kept is not None and (kept / MANIFEST).is_file():
        logger.warning("a save was killed while replacing %s; reading %s", path, kept)
        return kept
    raise CheckpointError(f"{path} is incomplete: a save to it is under way, or was killed. Load another checkpoint.")


def _replace(done: Upload, manifest: Manifest, old: set[str]) -> dict[str, Identity]:
    """Copy the files over those of the old checkpoint, which from here on is found no longer, but the new one is."""
    prefix, target = done.prefix, done.target
    fs = file_system(target)
    mark(target, done.name, complete=True, old=old)
    discard(target / MANIFEST)
    rest = [key(target / name) for name in sorted(old - {MANIFEST})]
    if rest:
        fs.rm(rest)
        refresh(target)

    def copy(name: str, path: Path) -> None:
        make_parent(path)
        fs.cp_file(key(prefix / name), key(path))

    written = _write_all(manifest.files, done, target, copy)
    check_unchanged(done, written)
    write_file(target / MANIFEST, manifest_text(manifest))
    return written


def _write_all(files: Files, save: Upload, directory: Path, write: Callable[[str, Path], None]) -> dict[str, Identity]:
    """Write files below a remote directory, several at a time, and return what it tells about each."""

    def one(name: str) -> tuple[str, Identity]:
        path = directory / name
        if directory != save.target:
            write(name, path)
            return name, identity(path)
        check_own(save)
        write(name, path)
        if taken_over(save):
            undo_late(save, name, files[name])
        return name, identity(path)

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(one, files))


def _is_written(target: Path) -> bool:
    """Return whether the directory, or one beside it, must stay readable until the new checkpoint is complete."""
    if (target / MARKER).is_file() and not _complete(target):
        kept = _copied(target)
        return kept is not None and _complete(kept)
    return bool(keys_below(target))


def _complete(path: Path) -> bool:
    try:
        return read_manifest(path) is not None
    except CheckpointError:
        return False


def _copied(target: Path) -> Path | None:
    """Return the directory that the marker names; its manifest is written before the marker."""
    name = read_marker(target).get("complete")
    return None if name is None else target.parent / Path(name).name


def _old(target: Path) -> set[str]:
    """Return the files of the checkpoint to replace, including those that a killed replacement has left."""
    kept = _copied(target)
    return {*listed_files(target), *read_marker(target).get("old", ()), *(() if kept is None else listed_files(kept))}


def _beside(target: Path) -> list[Path]:
    """Return the hidden directories of saves of `target`."""
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.saving-")]


def _clear(directory: Path) -> None:
    """Remove all files but the marker; the manifest first, so that what a kill leaves is no checkpoint."""
    discard(directory / MANIFEST)
    rest = [name for name in keys_below(directory) if not name.endswith(f"/{MARKER}")]
    if rest:
        file_system(directory).rm(rest)
    refresh(directory)
