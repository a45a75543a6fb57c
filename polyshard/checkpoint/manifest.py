"""`polyshard.json`: what a checkpoint consists of, so that a torn or altered one is recognised."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from polyshard.core.errors import CheckpointError
from polyshard.core.ranks import Ranks

logger = logging.getLogger(__name__)

MANIFEST = "polyshard.json"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `polyshard.json`.

    Attributes:
        kind: `"weights"`, or `"training-state"`.
        files: of the checkpoint, by relative path; all but the manifest itself.
        fingerprints: of each tensor, by slot and name (sixteen hexadecimal digits).
        state: of a training state: step, optimizer, data positions, layout.
    """

    kind: str
    files: Mapping[str, FileRecord]
    fingerprints: Mapping[str, Mapping[str, str]]
    state: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint."""
    (directory / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1))


def read_manifest(directory: Path) -> Manifest | None:
    """A directory's manifest; None where it has none (another program wrote it).

    Raises:
        CheckpointError: it cannot be read, or is of a later version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
        version = fields["version"]
        if version > VERSION:
            raise CheckpointError(
                f"{path} is of format version {version}; this polyshard reads up to {VERSION}: install a newer one"
            )
        files = {name: FileRecord(**record) for name, record in fields.pop("files").items()}
        return Manifest(files=files, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is torn or no manifest ({type(error).__name__}: {error})") from None


def missing_part(directory: Path, manifest: Manifest) -> str | None:
    """What is missing or of another size; None where all files are there in full. Content is not read."""
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{name} has {size} bytes, {record.bytes} were written"
    return None


def record_files(directory: Path, ranks: Ranks) -> dict[str, FileRecord]:
    """Size and checksum of every file under a directory; the ranks share the reading. A collective."""
    names = ranks.first(sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()))
    mine = _checksums(directory, names[ranks.rank :: ranks.size])
    return {name: record for part in ranks.gather(mine) for name, record in sorted(part.items())}


def verify_files(directory: Path, manifest: Manifest, ranks: Ranks) -> None:
    """Compare every file with its record; the ranks share the reading. A collective.

    Raises:
        CheckpointError: on every rank, naming the files that are missing, short or altered.
    """
    torn = missing_part(directory, manifest)
    error: Exception | None = None if torn is None else CheckpointError(f"{directory} is torn: {torn}; copy it again")
    altered: list[str] = []
    if error is None:
        names = sorted(manifest.files)[ranks.rank :: ranks.size]
        found = _checksums(directory, names)
        altered = [name for name in names if found[name] != manifest.files[name]]
    altered = [name for part in ranks.gather(altered) for name in part]
    if error is None and altered:
        error = CheckpointError(
            f"{directory}: the content of {', '.join(altered[:5])} is not what was written (SHA-256 differs): "
            "the file was altered or damaged; copy it again"
        )
    ranks.agree(error, f"{directory} cannot be loaded")


def _checksums(directory: Path, names: list[str]) -> dict[str, FileRecord]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter
        return dict(zip(names, pool.map(lambda name: _checksum(directory / name), names)))


def _checksum(path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(bytes=file.tell(), sha256=digest)
