"""Lazy reading of the tensors in a torch distributed checkpoint, a format that Megatron's checkpoints also use."""

from __future__ import annotations

import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from polyshard.convert.format import Options
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

# Modules and names that an index may refer to: its own types, and functions that rebuild layouts and paths.
_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
)
_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("builtins", "tuple"),
}


def stored_tensors(path: Path, options: Options) -> dict[str, LazyTensor]:
    """Return all tensors of a distributed checkpoint; its index `.metadata` is a pickle.

    Raises:
        CheckpointError: the index is damaged, a file that it names is missing or truncated, or parts of a tensor are
            missing (torch would leave them uninitialized).
    """
    options.need_pickle(path / ".metadata")
    try:
        metadata = PlainReader(path).read_metadata()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path / '.metadata'} is damaged or not an index: {type(error).__name__}: {error}"
        ) from None
    _check_files(path, metadata.storage_data or {})
    tensors = {
        k: entry for k, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    for key, entry in tensors.items():
        held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if held < math.prod(entry.size):
            raise CheckpointError(
                f"{path}: {key} is incomplete: got {held} of its {math.prod(entry.size)} elements. Copy the "
                "full checkpoint."
            )
    return {
        key: LazyTensor(tuple(entry.size), entry.properties.dtype, partial(_load, path, key, entry))
        for key, entry in tensors.items()
    }


class PlainReader(FileSystemReader):
    """torch's reader, which reads the index without running the functions that it names."""

    def read_metadata(self) -> Metadata:  # pyrefly: ignore  # the keyword for per-rank indices is unsupported
        """Return the index.

        Raises:
            CheckpointError: it refers to anything except torch's descriptions of tensors.
        """
        file = Path(self.path) / ".metadata"
        with file.open("rb") as stream:
            metadata = _Descriptions(stream, file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Descriptions(pickle.Unpickler):
    def __init__(self, stream: Any, file: Path) -> None:
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        known = module in _MODULES or (module, name) in _NAMES
        if not known and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            raise CheckpointError(
                f"{self.file} names {module}.{name}, which polyshard does not load, because it can run code. Expected "
                "only torch's descriptions of tensors. Save the model again with torch.distributed.checkpoint.save."
            )
        found = super().find_class(module, name)
        if module in _MODULES and not (isinstance(found, type) and found.__module__ == module):
            raise CheckpointError(f"{self.file} names {module}.{name}, which is not a description of tensors.")
        return found


def _check_files(path: Path, storage: dict[Any, Any]) -> None:
    ends: dict[str, int] = {}
    for info in storage.values():
        name = getattr(info, "relative_path", None)
        if isinstance(name, str):
            ends[name] = max(ends.get(name, 0), info.offset + info.length)
    missing = sorted(name for name in ends if not (path / name).is_file())
    if missing:
        raise CheckpointError(
            f"{path} is incomplete: {len(missing)} of its {len(ends)} files are missing: {', '.join(missing[:5])}. "
            "Copy the full checkpoint."
        )
    for name, end in ends.items():
        if (size := (path / name).stat().st_size) < end:
            raise CheckpointError(f"{path / name} is truncated: got {size} bytes, expected {end}. Copy it again.")


def _load(path: Path, key: str, entry: TensorStorageMetadata) -> torch.Tensor:
    target = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
    try:
        load(target, storage_reader=PlainReader(path), no_dist=True)
    except BaseException as error:  # torch's CheckpointException is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: {key} cannot be read: {first}") from None
    return target[key]
