"""Loading a Hugging Face directory into a model of any adapter and any parallel sizes, through its weight layouts."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.checkpoint.directory import find
from polyshard.checkpoint.files import TensorReader
from polyshard.checkpoint.manifest import Manifest, read_manifest, verify_files
from polyshard.checkpoint.quantization.reading import weights_reader
from polyshard.checkpoint.storage import BUCKET_BYTES, Progress
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError
from polyshard.core.pieces import Piece
from polyshard.core.ranks import Ranks
from polyshard.core.weight_table import (
    IGNORED_TENSORS,
    WeightEntry,
    WeightTable,
    stored_shape,
)
from polyshard.weights.regions import Region, regions
from polyshard.weights.view import view_weights

logger = logging.getLogger(__name__)


def load_checkpoint(
    model: nn.Module | Any,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    ignore: Sequence[str] = IGNORED_TENSORS,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Load every parameter of the model. If the checkpoint does not match the model, nothing is changed.

    This is a collective: every rank must call it. Each rank reads only its own elements, into its own memory.
    Weights quantized as FP8, as compressed-tensors int8 or float8, or as MXFP4 are dequantized while they are read,
    with a warning.

    Args:
        model: a model as its factory built it, or the training engine around one.
        directory: a Hugging Face directory with config.json and safetensors, or a training state; a path, or a URL of
            fsspec such as `s3://bucket/name`, of which each rank transfers the rows that it needs.
        parallel_context: the context that the model was built with.
        ignore: shell patterns of stored tensors that the model may leave unused.
        verify: compare each file's checksum with the manifest, if there is one.
        progress: called with (elements read, total elements) of this rank.

    Raises:
        CheckpointError: files are missing, truncated or altered; tensors are missing, unexpected, or have the wrong
            shape or dtype (the message lists all of them); or weights are quantized in an unsupported way.
        ConfigurationError: `model` is the model of an engine that keeps the weights elsewhere; pass the engine.

    Examples:
        >>> context = ps.initialize("torch")
        >>> model = torch.nn.Linear(2, 2)
        >>> directory = ps.save_checkpoint(model, "out", context, config={"model_type": "example"})
        >>> restored = torch.nn.Linear(2, 2)
        >>> load_checkpoint(restored, directory, context)
        >>> torch.equal(restored.weight, model.weight)
        True
    """
    ranks = Ranks.of(parallel_context)
    path = ranks.run_on_all(lambda: find(directory), f"{directory} cannot be loaded; nothing was changed")
    view = view_weights(model, parallel_context, written=True)
    reader = _checked(path, view.table, ignore, ranks, verify)
    axis = parallel_context.axis("tensor")
    pieces = list(view.pieces())
    read_pieces(reader, pieces, view.table, axis.rank, axis.size, progress)
    view.written(pieces)
    if view.has_masters:
        read_pieces(reader, view.masters(), view.table, axis.rank, axis.size, progress)
        view.masters_written()


def _checked(path: Path, table: WeightTable, ignore: Sequence[str], ranks: Ranks, verify: bool) -> TensorReader:
    """Return a reader whose tensors match the model. An error on any rank is raised on every rank."""

    def opened() -> tuple[Manifest | None, TensorReader, str | None]:
        manifest = read_manifest(path) if path.is_dir() else None
        reader, note = weights_reader(path, known_names(table), ignore)
        check_fit(table, reader, ignore)
        return manifest, reader, note

    manifest, reader, note = ranks.run_on_all(opened, f"{path} cannot be loaded; nothing was changed")
    if note is not None and ranks.rank == 0:
        logger.warning("%s: %s", path, note)
    if manifest is not None and verify:
        verify_files(path, manifest, ranks)
    return reader


def read_pieces(
    reader: TensorReader,
    pieces: Iterable[Piece],
    table: WeightTable,
    tensor_rank: int,
    tensor_size: int,
    progress: Progress | None = None,
) -> None:
    """Fill each piece from the stored tensors, converting the dtype. Padding becomes zero."""
    held = list(pieces)
    total = sum(len(piece.values) for piece in held)
    done = 0
    for piece in held:
        entry = table[piece.parameter]
        found = regions(entry, tensor_rank, tensor_size, piece.start, piece.start + len(piece.values))
        with torch.no_grad():
            if sum(region.numel for region in found) < len(piece.values):
                piece.values.zero_()
            for region in found:
                source = source_name(entry, region, reader.where)
                for target, offsets in _buckets(region, region.view(piece.values, piece.start)):
                    target.copy_(reader.region(source, offsets, tuple(target.shape)))
        done += len(piece.values)
        if progress is not None:
            progress(done, total)


def known_names(table: WeightTable) -> set[str]:
    """Return every name under which a checkpoint may store a weight of the model."""
    tied = {name for entry in table.values() for name in entry.tied_names}
    return tied | set(table.by_checkpoint_name())


def source_name(entry: WeightEntry, region: Region, stored: Mapping[str, object]) -> str:
    """Return the name of the stored tensor: the region's own, or that of a weight it is tied to."""
    return region.name if region.name in stored else next(name for name in entry.tied_names if name in stored)


def _buckets(region: Region, target: torch.Tensor) -> Iterable[tuple[torch.Tensor, tuple[int, ...]]]:
    if target.dim() == 0 or target.nbytes <= BUCKET_BYTES:
        return [(target, region.offsets)]
    step = max(1, BUCKET_BYTES * len(target) // target.nbytes)
    return [(part, (region.offsets[0] + i * step, *region.offsets[1:])) for i, part in enumerate(target.split(step))]


def check_fit(table: WeightTable, reader: TensorReader, ignore: Sequence[str]) -> None:
    """Raise `CheckpointError` listing all tensors that are missing, unexpected, or of the wrong shape or dtype."""
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
    misshapen, numbers = [], []
    for name, (entry, index) in targets.items():
        source = name if name in reader.where else next((t for t in entry.tied_names if t in reader.where), None)
        if source is None:
            continue
        expected = stored_shape(entry.layout, len(entry.checkpoint_names), index)
        if reader.shape(source) != expected:
            misshapen.append(f"{source}: got {list(reader.shape(source))}, expected {list(expected)}")
        if not (reader.dtype(source).is_floating_point and reader.dtype(source).itemsize > 1):
            numbers.append(f"{source} is {str(reader.dtype(source)).removeprefix('torch.')}")
    if misshapen:
        problems.append(f"wrong shape ({len(misshapen)}): {_some(misshapen)}")
    if numbers:
        problems.append(
            f"wrong dtype, expected float16, bfloat16, float32 or float64 ({len(numbers)}): {_some(numbers)}. "
            "Dequantize a quantized checkpoint first"
        )
    for name, entry in tied.items():
        first = entry.checkpoint_names[0]
        if name in reader.where and first in reader.where and not _same(reader, name, first):
            problems.append(f"{name} and {first} are tied in the model but differ in the checkpoint")
    if problems:
        raise CheckpointError("the checkpoint does not match the model; nothing was loaded. " + "; ".join(problems))


def _same(reader: TensorReader, first: str, second: str) -> bool:
    shape = reader.shape(first)
    if shape != reader.shape(second):
        return False
    rows = max(1, BUCKET_BYTES // (4 * max(1, torch.Size(shape[1:]).numel())))

    def part(name: str, start: int) -> torch.Tensor:
        return reader.region(name, (start, *[0] * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:]))

    return all(torch.equal(part(first, start), part(second, start)) for start in range(0, shape[0], rows))


def _stored_as_tied(target: tuple[WeightEntry, int], reader: TensorReader) -> bool:
    return any(name in reader.where for name in target[0].tied_names)


def _some(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f", and {len(items) - 8} more" if len(items) > 8 else "")
