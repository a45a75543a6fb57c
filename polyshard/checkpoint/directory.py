"""A checkpoint's directory: built beside its final place and put there in one step, so that it is whole or not there.

Where a checkpoint is replaced, old and new change places in one system call (Linux, renameat2); elsewhere in two
renames, and a process killed between them leaves the old one as `.NAME.replaced-...`, which reading finds.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from polyshard.checkpoint.manifest import MANIFEST, missing_part, read_manifest
from polyshard.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def staging_name(target: Path) -> str:
    """A name beside `target` that says who is writing."""
    return f".{target.name}.saving-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def begin(target: Path, staging: Path) -> None:
    """Make the staging directory, and remove what killed saves of the same target left behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.saving-*"):
        if _is_abandoned(stale):
            logger.warning("removing %s: the process that was saving it is gone", stale)
            shutil.rmtree(stale, ignore_errors=True)
    staging.mkdir()


def _forget_replaced(target: Path) -> None:
    """Once a new one stands, what a killed replacement left aside is of no use."""
    for kept in target.parent.glob(f".{target.name}.replaced-*"):
        shutil.rmtree(kept, ignore_errors=True)


def publish(staging: Path, target: Path) -> None:
    """Put the finished directory into place; what was there is gone afterwards."""
    for path in (*staging.rglob("*"), staging):
        sync_path(path)
    if not target.exists():
        os.rename(staging, target)
        sync_path(target.parent)
        _forget_replaced(target)
        return
    if _exchange(staging, target):
        sync_path(target.parent)
        shutil.rmtree(staging, ignore_errors=True)
        return
    previous = target.parent / f".{target.name}.replaced-{secrets.token_hex(4)}"
    os.rename(target, previous)
    os.rename(staging, target)
    sync_path(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def find(directory: str | Path) -> Path:
    """The directory, or where a save that was killed while it replaced the directory left it."""
    path = Path(directory)
    if not path.exists():
        for kept in sorted(path.parent.glob(f".{path.name}.replaced-*")):
            logger.warning("%s is missing, a save was killed while replacing it: reading %s", path, kept)
            return kept
    return path


def whole_checkpoints(root: str | Path) -> Iterator[tuple[int, Path]]:
    """Step and directory of each whole checkpoint directly under `root`; torn ones are told in the log."""
    for path in sorted(Path(root).iterdir()):
        if path.name.startswith(".") or not (path / MANIFEST).is_file():
            continue
        try:
            manifest = read_manifest(path)
            assert manifest is not None
            torn = missing_part(path, manifest)
        except CheckpointError as error:
            logger.warning("passing over %s: %s", path, error)
            continue
        if torn is not None:
            logger.warning("passing over %s: %s", path, torn)
            continue
        yield int(manifest.state.get("step", -1)), path


def latest_checkpoint(root: str | Path) -> Path | None:
    """The newest whole checkpoint directly under `root`, by its step and then by its time; None where there is none.

    A directory whose save was killed, or whose files are missing or short, is passed over with a warning.
    """
    if not Path(root).is_dir():
        return None
    found = [(step, path.stat().st_mtime_ns, path) for step, path in whole_checkpoints(root)]
    return max(found)[2] if found else None


def _exchange(first: Path, second: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # the file system cannot
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
    """Bring a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
