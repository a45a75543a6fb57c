"""Atomic writing of a Hugging Face directory from full tensors, one at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.directory import begin, behind_link, publish, reason, staging_name
from polyshard.checkpoint.files import INDEX
from polyshard.checkpoint.manifest import Manifest, record_files, write_manifest
from polyshard.checkpoint.plan import StoredTensor, index_of, plan_files
from polyshard.checkpoint.save import MAX_SHARD_BYTES, model_documents
from polyshard.checkpoint.storage import allocate, put
from polyshard.core.errors import CheckpointError
from polyshard.core.pieces import WEIGHT
from polyshard.core.ranks import Ranks
from polyshard.weights.fingerprint import fingerprint, text


def write_tensors(
    directory: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]],
    config: Mapping[str, Any],
    *,
    companions: Mapping[str, Path] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write a model directory, and return the fingerprint of each tensor as written.

    Args:
        directory: the target. A checkpoint there is replaced; other files are kept.
        tensors: name, shape, dtype to store, and a function that loads the tensor; one is held in memory at a time.
        config: fields of config.json.
        companions: files to copy, by their path in the directory.
        max_shard_bytes: size above which weights are split over several files.
        progress: called with (bytes written, total bytes).

    Raises:
        CheckpointError: a tensor could not be read or written; nothing is left behind.

    Examples:
        >>> tensors = [("a.weight", (2,), torch.float32, lambda: torch.ones(2))]
        >>> sorted(write_tensors(Path("out"), tensors, {"model_type": "example"}))
        ['a.weight']
    """
    listed = list(tensors)
    stored = [StoredTensor(key=name, name=name, shape=shape, dtype=dtype) for name, shape, dtype, _ in listed]
    files = plan_files("model", stored, max_shard_bytes)
    where = {tensor.key: (file, tensor) for file in files for tensor in file.tensors}
    dtypes = {name: dtype for name, _, dtype, _ in listed}
    target = behind_link(directory)
    staging = target.parent / staging_name(target)
    prints: dict[str, int] = {}
    done, total = 0, sum(tensor.nbytes for tensor in stored)
    try:
        begin(target, staging)
        for file in files:
            allocate(staging / file.path, file)
        for name, shape, dtype, load in listed:
            file, tensor = where[name]
            values = load().to(device="cpu", dtype=dtype)
            if tuple(values.shape) != shape:
                raise CheckpointError(f"{name} has the wrong shape: got {list(values.shape)}, expected {list(shape)}")
            descriptor = os.open(staging / file.path, os.O_WRONLY)
            try:
                put(descriptor, file.places[name], tensor, values.contiguous(), (0,) * values.dim())
            finally:
                os.close(descriptor)
            prints[name] = fingerprint(values)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
        if len(files) > 1:
            (staging / INDEX).write_text(json.dumps(index_of(files), indent=2))
        for name, fields in model_documents(config, None, None, dtypes, copied=True).items():
            (staging / name).write_text(json.dumps(fields, indent=2))
        for place, source in (companions or {}).items():
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staging / place)
        fingerprints = {WEIGHT: {name: text(value) for name, value in prints.items()}}
        records = record_files(staging, Ranks())
        write_manifest(staging, Manifest(kind="weights", files=records, fingerprints=fingerprints))
        publish(staging, target)
    except OSError as error:
        raise CheckpointError(
            f"writing {directory} failed; nothing was changed: {reason(error, staging, target)}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return prints
