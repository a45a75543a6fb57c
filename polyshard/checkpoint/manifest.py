"""`polyshard.json`, the manifest of a checkpoint, by which a truncated or altered checkpoint is detected."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from blake3 import blake3

from polyshard.checkpoint.location import file_system, is_remote, key
from polyshard.core.errors import CheckpointError
from polyshard.core.ranks import Ranks

logger = logging.getLogger(__name__)

MANIFEST = "polyshard.json"
_BLOCK = 16 << 20  # bytes of one request to a remote file system
VERSION = 2  # version 1 recorded SHA-256

Algorithm = Literal["blake3", "sha256"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size in bytes and checksum of one file."""

    bytes: int
    digest: str
    algorithm: Algorithm = "blake3"

    def as_json(self) -> dict[str, Any]:
        """Return the record as it stands in the manifest: the digest under the name of its algorithm."""
        return {"bytes": self.bytes, self.algorithm: self.digest}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> FileRecord:
        """Return the record that stands in a manifest."""
        for algorithm in get_args(Algorithm):
            if set(record) == {"bytes", algorithm}:
                return cls(bytes=record["bytes"], digest=record[algorithm], algorithm=algorithm)
        raise ValueError(f"unknown checksum in {dict(record)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `polyshard.json`.

    Attributes:
        kind: `"weights"` or `"training-state"`.
        files: record of every file but the manifest itself, keyed by relative path.
        fingerprints: sixteen hexadecimal digits for each tensor, keyed by slot and name.
        state: of a training state: step, optimizer, data positions and parallel layout.
    """

    kind: str
    files: Mapping[str, FileRecord]
    fingerprints: Mapping[str, Mapping[str, str]]
    state: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, which must be the last file of a checkpoint to be written."""
    (directory / MANIFEST).write_text(manifest_text(manifest))


def manifest_text(manifest: Manifest) -> str:
    """Return the content of the file."""
    files = {name: record.as_json() for name, record in manifest.files.items()}
    return json.dumps({**asdict(manifest), "files": files}, indent=1)


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a directory, or None if it has none (another program wrote the directory).

    Raises:
        CheckpointError: the manifest cannot be read or has a newer format version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
        version = fields["version"]
        if version > VERSION:
            raise CheckpointError(
                f"{path} has an unsupported version: got {version}, expected at most {VERSION}. Upgrade polyshard."
            )
        files = {name: FileRecord.from_json(record) for name, record in fields.pop("files").items()}
        return Manifest(files=files, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is truncated or not a manifest ({type(error).__name__}: {error})") from None


def missing_part(directory: Path, manifest: Manifest) -> str | None:
    """Describe the first file that is missing or has the wrong size; None if there is none. Contents are not read."""
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{name} has the wrong size: got {size} bytes, expected {record.bytes}"
    return None


def record_files(directory: Path, ranks: Ranks) -> dict[str, FileRecord]:
    """Return size and checksum of every file under a directory. A collective: the ranks share the reading."""
    names = ranks.broadcast(sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()))
    mine = checksums(directory, dict.fromkeys(names[ranks.rank :: ranks.size], "blake3"))
    return joined(ranks.gather(mine))


def joined(parts: Iterable[Mapping[str, FileRecord]]) -> dict[str, FileRecord]:
    """Return the records of all ranks, by name."""
    return dict(sorted((name, record) for part in parts for name, record in part.items()))


def verify_files(directory: Path, manifest: Manifest, ranks: Ranks) -> None:
    """Compare every file with its record. A collective: the ranks share the reading.

    Raises:
        CheckpointError: files are missing, truncated or altered; raised on every rank, naming them.
    """
    problem = missing_part(directory, manifest)
    error: Exception | None = None
    if problem is not None:
        error = CheckpointError(f"{directory} is incomplete: {problem}. Copy it again.")
    altered: list[str] = []
    if error is None:
        names = sorted(manifest.files)[ranks.rank :: ranks.size]
        found = checksums(directory, {name: manifest.files[name].algorithm for name in names})
        altered = [name for name in names if found[name] != manifest.files[name]]
    altered = [name for part in ranks.gather(altered) for name in part]
    if error is None and altered:
        error = CheckpointError(
            f"{directory} is damaged: the checksum of {', '.join(altered[:5])} is not the recorded one. Copy it again."
        )
    ranks.raise_on_all(error, f"{directory} cannot be loaded")


def checksums(directory: Path, names: Mapping[str, Algorithm]) -> dict[str, FileRecord]:
    """Return size and checksum of the named files under a directory."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # both algorithms release the GIL
        records = pool.map(lambda name: _checksum(directory / name, names[name]), names)
        return dict(zip(names, records))


def _checksum(path: Path, algorithm: Algorithm) -> FileRecord:
    if is_remote(path):
        return _remote_checksum(path, algorithm)
    if algorithm == "blake3":
        tree = blake3(max_threads=blake3.AUTO)
        tree.update_mmap(path)
        return FileRecord(bytes=path.stat().st_size, digest=tree.hexdigest())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
        return FileRecord(bytes=file.tell(), digest=digest, algorithm=algorithm)


def _remote_checksum(path: Path, algorithm: Algorithm) -> FileRecord:
    hashed: Any = blake3() if algorithm == "blake3" else hashlib.new(algorithm)
    size, fs = path.stat().st_size, file_system(path)
    for start in range(0, size, _BLOCK):
        hashed.update(fs.cat_file(key(path), start=start, end=min(size, start + _BLOCK)))
    return FileRecord(bytes=size, digest=hashed.hexdigest(), algorithm=algorithm)
