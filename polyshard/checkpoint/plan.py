"""The position of every tensor in the files of a checkpoint, computed up front so that all ranks write in parallel."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from polyshard.core.errors import ConfigurationError

# Names of the safetensors format: https://github.com/huggingface/safetensors#format
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        key: unique across all files of the checkpoint.
        name: name in its file.
        shape: full shape.
        dtype: dtype as stored.
    """

    key: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A safetensors file: its header and the byte offset of each tensor.

    Format: https://github.com/huggingface/safetensors#format
    """

    path: str  # relative to the checkpoint
    tensors: tuple[StoredTensor, ...]
    header: bytes = field(init=False, repr=False)
    places: dict[str, int] = field(init=False, repr=False)  # key -> offset of the first byte in the file
    size: int = field(init=False)

    def __post_init__(self) -> None:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places: dict[str, int] = {}
        end = 0
        # Widest dtype first, as the safetensors library does: every tensor is then aligned to its element size.
        for tensor in sorted(self.tensors, key=lambda t: -t.dtype.itemsize):
            places[tensor.key] = end
            entries[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        object.__setattr__(self, "header", header)
        object.__setattr__(self, "places", {key: place + len(header) for key, place in places.items()})
        object.__setattr__(self, "size", len(header) + end)


def plan_files(stem: str, tensors: Iterable[StoredTensor], limit: int) -> list[PlannedFile]:
    """Distribute tensors over files of at most `limit` bytes each, or one tensor if that is larger.

    Args:
        stem: `model` results in `model.safetensors`, or `model-00001-of-00002.safetensors` and so on.
        tensors: in the order in which they are stored.
        limit: maximum size of a file in bytes.

    Raises:
        ConfigurationError: the limit is no positive number.
    """
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
        raise ConfigurationError(f"max_shard_bytes is invalid: got {limit!r}, expected a number of bytes from 1.")
    groups: list[list[StoredTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    if len(groups) == 1:
        return [PlannedFile(f"{stem}.safetensors", tuple(groups[0]))]
    return [
        PlannedFile(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    ]


def index_of(files: Iterable[PlannedFile]) -> dict[str, object]:
    """Return the content of `model.safetensors.index.json` for these files."""
    files = list(files)
    return {
        "metadata": {"total_size": sum(tensor.nbytes for file in files for tensor in file.tensors)},
        "weight_map": {tensor.name: file.path for file in files for tensor in file.tensors},
    }
