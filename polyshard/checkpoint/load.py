"""Weights from a Hugging Face directory into a model of any adapter and size, through the weight layouts."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.checkpoint.files import TensorReader
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError
from polyshard.core.weight_table import (
    IGNORED_TENSORS,
    WeightEntry,
    WeightTable,
    collect_layouts,
    local_part,
    stored_shape,
)


def load_checkpoint(
    model: nn.Module | Any,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    ignore: Sequence[str] = IGNORED_TENSORS,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Load every parameter exactly once. Nothing is changed where the checkpoint does not fit.

    Args:
        model: a model as its factory built it, or a training engine around one.
        directory: with config.json and safetensors.
        parallel_context: the context that the model was built with.
        ignore: shell patterns of stored tensors that may be left over.
        progress: called with (tensors done, tensors in all).

    Raises:
        CheckpointError: files are missing or torn, or tensors are missing, unexpected or of another shape; the
            message lists all of them.
    """
    reader = TensorReader(Path(directory))
    engine = None if isinstance(model, nn.Module) else model
    table: WeightTable = collect_layouts(model) if engine is None else engine.table
    check_fit(table, reader, ignore)
    parameters = dict((model if engine is None else engine.module).named_parameters())
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}

    shards = _shards(table, reader, parallel_context, dtypes, progress)
    if engine is not None:
        engine.load_weights(shards)
        return
    with torch.no_grad():
        for name, shard in shards:
            parameters[name].copy_(shard)


def check_fit(table: WeightTable, reader: TensorReader, ignore: Sequence[str]) -> None:
    """Raise `CheckpointError` with all that is missing, unexpected or of another shape."""
    targets = table.by_checkpoint_name()
    tied = {name: entry for entry in table.values() for name in entry.tied_names}
    problems = []
    missing = [name for name in targets if name not in reader.where and not _stored_as_tied(targets[name], reader)]
    if missing:
        problems.append(f"missing ({len(missing)}): {_some(missing)}")
    unexpected = [
        name
        for name in reader.where
        if name not in targets and name not in tied and not any(fnmatch.fnmatch(name, p) for p in ignore)
    ]
    if unexpected:
        problems.append(f"unexpected ({len(unexpected)}): {_some(unexpected)}")
    misshapen = []
    for name, (entry, index) in targets.items():
        source = name if name in reader.where else next((t for t in entry.tied_names if t in reader.where), None)
        if source is None:
            continue
        expected = stored_shape(entry.layout, len(entry.checkpoint_names), index)
        if reader.shape(source) != expected:
            misshapen.append(f"{source} is {list(reader.shape(source))}, the model has {list(expected)}")
    if misshapen:
        problems.append(f"of another shape ({len(misshapen)}): {_some(misshapen)}")
    for name, entry in tied.items():
        first = entry.checkpoint_names[0]
        if (
            name in reader.where
            and first in reader.where
            and not torch.equal(reader.tensor(name), reader.tensor(first))
        ):
            problems.append(f"{name} and {first} are tied in the model, but differ in the checkpoint")
    if problems:
        raise CheckpointError("the checkpoint does not fit the model; nothing was loaded. " + "; ".join(problems))


def _stored_as_tied(target: tuple[WeightEntry, int], reader: TensorReader) -> bool:
    return any(name in reader.where for name in target[0].tied_names)


def _some(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f", and {len(items) - 8} more" if len(items) > 8 else "")


def _shards(
    table: WeightTable,
    reader: TensorReader,
    context: ParallelContext,
    dtypes: dict[str, torch.dtype],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    rank, size = context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()
    for done, entry in enumerate(table.values(), start=1):
        count = len(entry.checkpoint_names)
        parts = []
        for index, name in enumerate(entry.checkpoint_names):
            source = name if name in reader.where else next(t for t in entry.tied_names if t in reader.where)
            parts.append(local_part(entry.layout, count, index, reader.tensor(source), rank, size)[0])
        shard = parts[0] if count == 1 else torch.cat(parts, dim=entry.layout.dim or 0)
        yield entry.parameter, shard.to(dtypes[entry.parameter])
        if progress is not None:
            progress(done, len(table))
