"""Atomic replacement of a checkpoint directory: it is built beside its final path and renamed into place.

An existing checkpoint is exchanged with the new one in one system call (renameat2, Linux). On other systems this takes
two renames; a process killed between them leaves the old checkpoint as `.NAME.replaced-...`, where `find` looks.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from polyshard.checkpoint.location import as_path, is_remote
from polyshard.checkpoint.manifest import MANIFEST, missing_part, read_manifest
from polyshard.checkpoint.others import keep, local_files, other_files, refuse_other_weights
from polyshard.checkpoint.remote.publish import published
from polyshard.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def behind_link(target: Path) -> Path:
    """Return the directory that a symbolic link names, which a save replaces instead of the link; else `target`."""
    return target.resolve() if target.is_symlink() else target


def reason(error: Exception, staging: Path, target: Path) -> str:
    """Return the text of an error, with the target in place of the hidden directory in which it was built."""
    name = re.escape(target.name)
    return re.sub(rf"{re.escape(str(staging))}(/(\.{name}\.saving-[^/']+|target(?=[/';]|$)))?", str(target), str(error))


def staging_name(target: Path) -> str:
    """Return a path name beside `target` that contains the host name and ID of the writing process."""
    return f".{target.name}.saving-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def begin(target: Path, staging: Path) -> None:
    """Create the staging directory, and remove directories that killed saves of the same target left behind.

    Raises:
        CheckpointError: the target is a file, which the checkpoint would replace.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory or no such path. Name another directory.")
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.saving-*"):
        if _is_abandoned(stale):
            logger.warning("removing %s: the process that was saving it no longer runs", stale)
            shutil.rmtree(stale, ignore_errors=True)
    staging.mkdir()


def _forget_replaced(target: Path) -> None:
    """Remove the copies that killed replacements left aside; the new checkpoint makes them obsolete."""
    for kept in target.parent.glob(f".{target.name}.replaced-*"):
        shutil.rmtree(kept, ignore_errors=True)


def publish(staging: Path, target: Path) -> None:
    """Move the finished directory into place and delete the checkpoint that was there before, but no other files.

    Raises:
        CheckpointError: there are other weights, which would lie beside those of the checkpoint.
    """
    for path in staging.rglob("*"):
        sync_path(path)
    if target.exists():
        others = _other_files(target, staging)
        refuse_other_weights(target, others)
        keep(others, target, staging)
    for folder, *_ in os.walk(staging):  # the files that are kept may be links or pipes, which cannot be flushed
        sync_path(Path(folder))
    if not target.exists():
        os.rename(staging, target)
        sync_path(target.parent)
        _forget_replaced(target)
        return
    if _exchange(staging, target):
        sync_path(target.parent)
        keep(_other_files(staging, target), staging, target)  # written since
        shutil.rmtree(staging, ignore_errors=True)
        return
    previous = target.parent / f".{target.name}.replaced-{secrets.token_hex(4)}"
    os.rename(target, previous)
    os.rename(staging, target)
    sync_path(target.parent)
    keep(_other_files(previous, target), previous, target)
    shutil.rmtree(previous, ignore_errors=True)


def _other_files(old: Path, new: Path) -> list[str]:
    """Return the files of the old directory that are neither in its checkpoint nor in the new directory."""
    return other_files(old, local_files(new))


def find(directory: str | Path) -> Path:
    """Return the directory, or the copy that a save left aside if it was killed while replacing the directory.

    Raises:
        CheckpointError: the directory is remote, and a save to it has not finished.
    """
    path = as_path(directory)
    if is_remote(path):
        return published(path)
    path = path if path.exists() else behind_link(path)
    if not path.exists():
        for kept in sorted(path.parent.glob(f".{path.name}.replaced-*")):
            logger.warning("%s is missing because a save was killed while replacing it; reading %s", path, kept)
            return kept
    return path


def complete_checkpoints(root: str | Path) -> Iterator[tuple[int, Path]]:
    """Yield step and directory of each complete checkpoint directly under `root`; log a warning for the others."""
    for path in sorted(as_path(root).iterdir()):
        if path.name.startswith("."):
            continue
        try:
            manifest = read_manifest(find(path) if is_remote(path) else path)
            if manifest is None:
                continue
            problem = missing_part(find(path) if is_remote(path) else path, manifest)
        except CheckpointError as error:
            logger.warning("skipping %s: %s", path, error)
            continue
        if problem is not None:
            logger.warning("skipping %s: %s", path, problem)
            continue
        yield int(manifest.state.get("step", -1)), path


def latest_checkpoint(root: str | Path) -> Path | None:
    """Return the newest complete checkpoint directly under `root`, by step and then by time, or None.

    `root` may be a URL, such as `s3://bucket/runs/a`; the result is then a `UPath`, which the loading functions take.
    A directory whose save was killed, or with missing or truncated files, is skipped with a warning.

    Examples:
        >>> context = ps.initialize("torch")
        >>> for step in (10, 20):
        ...     _ = ps.save_checkpoint(torch.nn.Linear(2, 2), f"run/{step}", context, config={})
        >>> latest_checkpoint("run")
        PosixPath('run/20')
    """
    if not as_path(root).is_dir():
        return None
    found = [(step, _written(path), path) for step, path in complete_checkpoints(root)]
    return max(found)[2] if found else None


def _written(path: Path) -> int:
    """Return the time of a checkpoint; an object store has none for a directory."""
    return (find(path) / MANIFEST if is_remote(path) else path).stat().st_mtime_ns


def _exchange(first: Path, second: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not supported by the file system
        return False
    raise OSError(code, os.strerror(code), str(second))


def _is_abandoned(staging: Path) -> bool:
    host, _, rest = staging.name.partition(".saving-")[2].rpartition("-")[0].rpartition("-")
    if host != socket.gethostname() or not rest.isdigit():
        return False
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def sync_path(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
