"""The tensors of a torch distributed checkpoint, one at a time; Megatron's checkpoints are such, too."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import LazyTensor, Options


def stored_tensors(path: Path, options: Options) -> dict[str, LazyTensor]:
    """All tensors of a distributed checkpoint; its index `.metadata` is a pickle."""
    options.need_pickle(path / ".metadata")
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:
        raise CheckpointError(f"{path / '.metadata'} is torn or no index: {type(error).__name__}: {error}") from None
    return {
        key: LazyTensor(tuple(entry.size), entry.properties.dtype, partial(_load, path, key, entry))
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


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
