"""The tensors of a torch distributed checkpoint, one at a time; Megatron's checkpoints are such, too."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import LazyTensor, Options


def stored_tensors(path: Path, options: Options) -> dict[str, LazyTensor]:
    """All tensors of a distributed checkpoint; its index `.metadata` is a pickle.

    Raises:
        CheckpointError: the index is torn, a file that it names is missing or cut off, or parts of a tensor are missing
            (torch would leave them uninitialized).
    """
    options.need_pickle(path / ".metadata")
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{path / '.metadata'} is torn or no index: {type(error).__name__}: {error}") from None
    _check_files(path, metadata.storage_data or {})
    tensors = {
        k: entry for k, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }
    for key, entry in tensors.items():
        held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if held < math.prod(entry.size):
            raise CheckpointError(
                f"{path}: {key} is incomplete: got {held} of its {math.prod(entry.size)} elements. Copy the whole "
                "checkpoint."
            )
    return {
        key: LazyTensor(tuple(entry.size), entry.properties.dtype, partial(_load, path, key, entry))
        for key, entry in tensors.items()
    }


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
            "Copy "
            "the whole checkpoint."
        )
    for name, end in ends.items():
        if (size := (path / name).stat().st_size) < end:
            raise CheckpointError(f"{path / name} is torn: got {size} bytes, expected {end}. Copy it again.")


def _load(path: Path, key: str, entry: TensorStorageMetadata) -> torch.Tensor:
    target = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
    try:
        load(target, storage_reader=FileSystemReader(path), no_dist=True)
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: {key} cannot be read: {first}") from None
    return target[key]
