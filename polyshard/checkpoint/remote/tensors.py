"""Random access to the tensors of a safetensors file that lies on a remote file system.

Only the header and the requested rows are transferred. The interface is the part of `safetensors.safe_open` that
`TensorReader` uses. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.location import file_system, key
from polyshard.checkpoint.plan import DTYPE_NAMES
from polyshard.core.errors import CheckpointError

_DTYPES = {text: dtype for dtype, text in DTYPE_NAMES.items()}
_FIRST_BYTES = 64 << 10  # usually holds the header, so that one request suffices


class RemoteTensors:
    """The tensors of one file.

    Args:
        path: a path of `as_path`.

    Raises:
        CheckpointError: the file is truncated or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._fs, self._key = path, file_system(path), key(path)
        size = path.stat().st_size
        head = self.read(0, min(size, _FIRST_BYTES))
        length = int.from_bytes(head[:8], "little")
        self._begin = 8 + length
        try:
            if len(head) < 8 or self._begin > size:
                raise ValueError("the header is incomplete")
            text = head[8 : self._begin] if self._begin <= len(head) else self.read(8, self._begin)
            self._entries: dict[str, Any] = json.loads(text)
            self._entries.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in self._entries.values()), default=0)
            if self._begin + end != size:
                raise ValueError(f"the header promises {self._begin + end} bytes")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} ({size} bytes) is truncated or not a safetensors file: {error}. Copy or save it again."
            ) from None

    def __enter__(self) -> RemoteTensors:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._entries)

    def get_slice(self, name: str) -> RemoteSlice:
        """Return a tensor to index, without reading it."""
        return RemoteSlice(self, self._entries[name], self._begin)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read a full tensor."""
        return self.get_slice(name)[()]

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes of the file."""
        data = self._fs.cat_file(self._key, start=start, end=stop) if stop > start else b""
        if len(data) != stop - start:
            raise CheckpointError(f"{self._path} is truncated: got {len(data)} of bytes {start} to {stop}")
        return data


class RemoteSlice:
    """A tensor in a file, read when it is indexed."""

    def __init__(self, file: RemoteTensors, entry: dict[str, Any], begin: int) -> None:
        self._file, self._dtype, self._shape = file, entry["dtype"], tuple(entry["shape"])
        self._start = begin + entry["data_offsets"][0]

    def get_dtype(self) -> str:
        """Return safetensors' name of the dtype."""
        return self._dtype

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._shape)

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        """Read a rectangle. The rows that contain it are transferred whole."""
        dtype = _DTYPES[self._dtype]
        if not index:
            first, last = 0, self._shape[0] if self._shape else 1
        else:
            first, last, _ = index[0].indices(self._shape[0])
        row = math.prod(self._shape[1:]) * dtype.itemsize
        rows = max(0, last - first)
        data = bytearray(self._file.read(self._start + first * row, self._start + (first + rows) * row))
        shape = (rows, *self._shape[1:]) if self._shape else ()
        values = torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
        return values[(slice(None), *index[1:])] if index else values
