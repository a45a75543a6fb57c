"""A shared-memory buffer of bounded size that carries full tensors from all trainer ranks to all workers."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyshard.core.errors import WeightSyncError

_ALIGN = 64  # bytes

TensorSpec = tuple[str, tuple[int, ...]]  # name and shape


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tensors that are sent together.

    Attributes:
        names: stored names of the tensors.
        shapes: full shapes.
        offsets: first byte of each tensor in the bucket.
        nbytes: total size in bytes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the names, shapes and offsets as JSON."""
        return {"names": list(self.names), "shapes": [list(s) for s in self.shapes], "offsets": list(self.offsets)}


def plan_chunks(tensors: Iterable[TensorSpec], itemsize: int, limit: int) -> list[Chunk]:
    """Divide tensors, in order, into chunks of at most `limit` bytes; a larger tensor gets its own chunk."""
    chunks: list[Chunk] = []
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    offsets: list[int] = []
    used = 0

    def close() -> None:
        if names:
            chunks.append(Chunk(tuple(names), tuple(shapes), tuple(offsets), used))

    for name, shape in tensors:
        size = torch.Size(shape).numel() * itemsize
        if names and used + size > limit:
            close()
            names, shapes, offsets, used = [], [], [], 0
        names.append(name)
        shapes.append(shape)
        offsets.append(used)
        used += -(-size // _ALIGN) * _ALIGN
    close()
    return chunks


class Bucket:
    """A file in shared memory, mapped by every process that uses it.

    Args:
        path: path of the file.
        nbytes: size in bytes.
        create: create the file, and remove it in `close`.
    """

    def __init__(self, path: str | Path, nbytes: int, *, create: bool = False) -> None:
        self.path, self.nbytes, self._owned = Path(path), nbytes, create
        if create:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, max(1, nbytes))
            except OSError as error:
                self.path.unlink()
                raise WeightSyncError(
                    f"{self.path.parent} has no space for a bucket of {nbytes} bytes ({error.strerror}). "
                    "Pass a smaller bucket_bytes, or enlarge the shared memory"
                ) from None
            finally:
                os.close(descriptor)
        elif not self.path.is_file() or self.path.stat().st_size < nbytes:
            raise WeightSyncError(
                f"the bucket {self.path} is missing or truncated. Run trainer and engine on one machine that "
                f"shares {path}"
            )
        self._memory = torch.from_file(str(self.path), shared=True, size=max(1, nbytes), dtype=torch.uint8)

    def tensors(self, chunk: Chunk, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return views of the chunk's full tensors."""
        result: dict[str, torch.Tensor] = {}
        for name, shape, offset in zip(chunk.names, chunk.shapes, chunk.offsets):
            size = torch.Size(shape).numel() * dtype.itemsize
            result[name] = self._memory[offset : offset + size].view(dtype).view(shape)
        return result

    def close(self) -> None:
        """Remove the file; existing mappings stay valid until their processes release them."""
        if self._owned:
            self.path.unlink(missing_ok=True)
            self._owned = False


def bucket_folder() -> Path:
    """Return the folder of shared memory; the folder for temporary files if there is none."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def bucket_path() -> Path:
    """Return a path that no other process uses."""
    return bucket_folder() / f"{_prefix()}{os.getpid()}-{secrets.token_hex(6)}"


def remove_abandoned(folder: Path | None = None) -> None:
    """Remove the buckets that killed processes of this host left behind."""
    for path in (folder or bucket_folder()).glob(f"{_prefix()}*-*"):
        pid = path.name.removeprefix(_prefix()).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)


def _prefix() -> str:
    # Containers may share the folder but have separate process IDs.
    return f"polyshard-{socket.gethostname()}-"


def chunk_from(fields: dict[str, Sequence[Any]], nbytes: int) -> Chunk:
    """Return the chunk that `Chunk.to_dict` encoded."""
    return Chunk(
        tuple(fields["names"]),
        tuple(tuple(shape) for shape in fields["shapes"]),
        tuple(fields["offsets"]),
        nbytes,
    )
