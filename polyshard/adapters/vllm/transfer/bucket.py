"""A buffer of bounded size in shared memory, through which whole tensors pass from all trainer ranks to all workers."""

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
    """The tensors that pass together.

    Attributes:
        names: of the tensors.
        shapes: whole.
        offsets: first byte of each in the bucket.
        nbytes: of all.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"names": list(self.names), "shapes": [list(s) for s in self.shapes], "offsets": list(self.offsets)}


def plan_chunks(tensors: Iterable[TensorSpec], itemsize: int, limit: int) -> list[Chunk]:
    """Tensors in order, in chunks of at most `limit` bytes, or one tensor that is larger."""
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
        path: of the file.
        nbytes: its size.
        create: make it, and remove it at `close`.
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
                    f"{self.path.parent} has no room for a bucket of {nbytes} bytes ({error.strerror}): "
                    "pass a smaller bucket_bytes, or enlarge the shared memory"
                ) from None
            finally:
                os.close(descriptor)
        elif not self.path.is_file() or self.path.stat().st_size < nbytes:
            raise WeightSyncError(
                f"the bucket {self.path} is not there in full: trainer and engine must share a machine and {path}"
            )
        self._memory = torch.from_file(str(self.path), shared=True, size=max(1, nbytes), dtype=torch.uint8)

    def tensors(self, chunk: Chunk, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Views of the chunk's tensors, whole."""
        result: dict[str, torch.Tensor] = {}
        for name, shape, offset in zip(chunk.names, chunk.shapes, chunk.offsets):
            size = torch.Size(shape).numel() * dtype.itemsize
            result[name] = self._memory[offset : offset + size].view(dtype).view(shape)
        return result

    def close(self) -> None:
        """Remove the file; mappings live on until their processes let go."""
        if self._owned:
            self.path.unlink(missing_ok=True)
            self._owned = False


def bucket_folder() -> Path:
    """Shared memory where the machine has it, else the folder for temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def bucket_path() -> Path:
    """A name that no other process has."""
    return bucket_folder() / f"{_prefix()}{os.getpid()}-{secrets.token_hex(6)}"


def remove_abandoned(folder: Path | None = None) -> None:
    """Remove buckets of this host whose makers are gone: killed processes leave theirs behind."""
    for path in (folder or bucket_folder()).glob(f"{_prefix()}*-*"):
        maker = path.name.removeprefix(_prefix()).partition("-")[0]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)


def _prefix() -> str:
    # Containers may share the memory's folder, but not the numbers of their processes.
    return f"polyshard-{socket.gethostname()}-"


def chunk_from(fields: dict[str, Sequence[Any]], nbytes: int) -> Chunk:
    """The inverse of `Chunk.to_dict`."""
    return Chunk(
        tuple(fields["names"]),
        tuple(tuple(shape) for shape in fields["shapes"]),
        tuple(fields["offsets"]),
        nbytes,
    )
