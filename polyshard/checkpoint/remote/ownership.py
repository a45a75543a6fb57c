"""Which save writes a remote directory, as its marker tells, and what another one that writes it, too, finds out.

A save takes over a directory that another one writes, since it cannot know whether that one is alive: a job that was
started again must not wait for what was killed. If the other is alive, it finds this save's name in the marker, and
fails. A file of it that arrives late is found by its `identity` before this save ends, or is found afterwards by the
other, beside the manifest: the directory is then marked incomplete.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyshard.checkpoint.location import file_system, key
from polyshard.checkpoint.manifest import MANIFEST, FileRecord, read_manifest
from polyshard.checkpoint.remote.identity import Identity, is_replaced
from polyshard.checkpoint.remote.requests import refresh, write_file
from polyshard.core.errors import CheckpointError

MARKER = ".polyshard-saving"
_ALONE = "Save again, and to a directory that no other run saves to."


@dataclass(frozen=True, slots=True)
class Upload:
    """A save to a remote directory.

    Attributes:
        target: the checkpoint's directory.
        name: of the save, which is that of a hidden directory beside `target`.
        in_place: whether the files go to `target` itself.
    """

    target: Path
    name: str
    in_place: bool

    @property
    def prefix(self) -> Path:
        """The directory into which the files go."""
        return self.target if self.in_place else self.target.parent / self.name


def undo_late(save: Upload, name: str, record: FileRecord) -> None:
    """Raise `CheckpointError`, and mark the directory if it is a checkpoint of which this save has replaced a file."""
    refresh(save.target)
    theirs = read_manifest(save.target)
    if theirs is None or name not in theirs.files or theirs.files[name] == record:
        check_own(save)  # the other save will find the file
        return
    mark_incomplete(save)
    raise CheckpointError(
        f"another save has finished {save.target} while this one was writing {name} there: the directory is marked "
        f"incomplete. {_ALONE}"
    )


def mark_incomplete(save: Upload) -> None:
    """Make the target what a killed save leaves, which the next save removes."""
    mark(save.target, None)
    discard(save.target / MANIFEST)


def check_unchanged(done: Upload, written: Mapping[str, Identity]) -> None:
    """Raise `CheckpointError` if another save has written to the target since this one."""
    refresh(done.target)
    check_own(done)
    for name, before in written.items():
        if is_replaced(done.target / name, before):
            raise CheckpointError(f"another save has written {name} of {done.target} at the same time. {_ALONE}")


def check_own(upload: Upload) -> None:
    """Raise `CheckpointError` if another save has taken the target over, or this rank does not see the marker."""
    if not taken_over(upload):
        return
    target = upload.target
    if not read_marker(target) and not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target / MARKER} is missing, which the save has written. All ranks must see the same file system, and "
            "no other run may save to the same directory at the same time."
        )
    raise CheckpointError(f"another save writes {target} at the same time. {_ALONE}")


def taken_over(upload: Upload) -> bool:
    """Return whether the marker in the target is not that of this save."""
    return read_marker(upload.target).get("save") != upload.name


def mark(target: Path, save: str | None, *, complete: bool = False, old: Collection[str] = ()) -> None:
    """Write the marker.

    Args:
        target: the checkpoint's directory.
        save: name of the save; None if none goes on writing.
        complete: whether the directory beside `target` of that name holds the complete new checkpoint.
        old: the files of the old checkpoint, which are being removed.
    """
    note = "A save writes this directory. Without polyshard.json it is no checkpoint."
    fields = {"note": note, "save": save, "complete": save if complete else None, "old": sorted(old)}
    write_file(target / MARKER, json.dumps(fields) + "\n")


def read_marker(target: Path) -> dict[str, Any]:
    """Return the fields of the marker; none without one."""
    try:
        found = json.loads((target / MARKER).read_text())
    except (ValueError, FileNotFoundError):
        return {}
    return found if isinstance(found, dict) else {}


def discard(path: Path) -> None:
    """Remove a remote file, if it is there."""
    if path.is_file():
        file_system(path).rm_file(key(path))
        refresh(path)
