"""Writer and planner for torch's distributed checkpoint: each rank writes its own elements into the final files.

Torch's `HuggingFaceStorageWriter` lets every rank write its own file, and one rank merges these. All bytes are then
written twice, a missing shard is filled with zeros, and a rank can hold only one box of a tensor. The writer below
overrides `write_data`: files are laid out and allocated first, and each rank writes its rectangles into them. Planning,
validation (nothing missing, nothing written twice) and the exchange of errors are torch's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from polyshard.checkpoint.directory import sync_path
from polyshard.checkpoint.plan import PlannedFile, StoredTensor
from polyshard.core.errors import CheckpointError
from polyshard.core.pieces import Piece
from polyshard.core.weight_table import WeightTable
from polyshard.weights.fingerprint import fingerprint, total
from polyshard.weights.movement import shared_run
from polyshard.weights.regions import regions

BUCKET_BYTES = 16 << 20  # extra memory that a dtype conversion or a copy from a device may take

Progress = Callable[[int, int], None]


def storage_key(slot: str, name: str) -> str:
    """Return the key of a tensor in torch's planner, since weights and optimizer slots have the same names."""
    return f"{slot}/{name}"


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Elements of a stored tensor that a rank writes.

    Attributes:
        key: key of the stored tensor.
        offsets: of the first element, in the stored tensor.
        values: a view of the live values.
    """

    key: str
    offsets: tuple[int, ...]
    values: torch.Tensor


def rectangles(pieces: Iterable[Piece], table: WeightTable, tensor_rank: int, tensor_size: int) -> Iterator[Rectangle]:
    """Yield the rectangles that this rank writes; those of all ranks cover every tensor once."""
    for piece in pieces:
        entry = table[piece.parameter]
        start, stop = shared_run(piece, entry.layout.local_shape(tensor_rank, tensor_size))
        for region in regions(entry, tensor_rank, tensor_size, start, stop):
            if region.first:
                values = region.view(piece.values, piece.start)
                yield Rectangle(storage_key(piece.slot, region.name), tuple(region.offsets), values)


class LayoutPlanner(DefaultSavePlanner):
    """A planner that offers a rank's pieces as rectangles of the stored tensors."""

    def __init__(
        self,
        pieces: Iterable[Piece],
        table: WeightTable,
        tensor_rank: int,
        tensor_size: int,
        stored: Mapping[str, StoredTensor],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._values: dict[MetadataIndex, torch.Tensor] = {}
        self._stored = stored
        for rectangle in rectangles(pieces, table, tensor_rank, tensor_size):
            index = MetadataIndex(rectangle.key, torch.Size(rectangle.offsets))
            self._values[index] = rectangle.values

    def create_local_plan(self) -> SavePlan:
        """Return a plan with one write for each rectangle."""
        self.plan = SavePlan([self._item(index, values) for index, values in self._values.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """Return the live values."""
        index = write_item.index
        return self._values[MetadataIndex(index.fqn, index.offset)]

    def _item(self, index: MetadataIndex, values: torch.Tensor) -> WriteItem:
        stored = self._stored[index.fqn]
        assert index.offset is not None
        return WriteItem(
            index=index,
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=index.offset, sizes=torch.Size(values.shape)),
                properties=TensorProperties(dtype=stored.dtype),
                size=torch.Size(stored.shape),
            ),
        )


class LayoutWriter(HuggingFaceStorageWriter):
    """A writer of rectangles into files with a precomputed layout.

    Attributes:
        fingerprints: fingerprint of every stored tensor as written, by key; set on the coordinator after the save.
    """

    def __init__(self, directory: Path, files: Sequence[PlannedFile], progress: Progress | None = None) -> None:
        super().__init__(path=str(directory), save_distributed=True)
        self._directory = directory
        self._files = list(files)
        self._where = {tensor.key: (file, tensor) for file in files for tensor in file.tensors}
        self._progress = progress
        self.fingerprints: dict[str, int] = {}
        self._written: list[Path] = []

    def flush(self) -> None:
        """Flush this rank's writes to disk; separate, so that checksums can be computed at the same time."""
        for path in self._written:
            sync_path(path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged; the directory already exists."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Check that every element is written, and allocate the files, so that a full disk is detected here."""
        sizes = ((item.index.fqn, item.tensor_data.chunk.sizes) for p in plans for item in p.items if item.tensor_data)
        check_complete(self._where, sizes)
        for file in self._files:
            allocate(self._directory / file.path, file)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's rectangles and compute their fingerprints."""
        by_file: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._where[item.index.fqn][0].path, []).append(item)
        elements = sum(planner.resolve_data(item).numel() for item in plan.items)  # pyrefly: ignore  # always tensors
        results: list[WriteResult] = []
        done = 0
        for path, items in by_file.items():
            descriptor = os.open(self._directory / path, os.O_WRONLY)
            try:
                for item in items:
                    values: Any = planner.resolve_data(item)
                    size, print_ = self._write(descriptor, item, values)
                    results.append(WriteResult(index=item.index, size_in_bytes=size, storage_data=print_))
                    done += values.numel()
                    if self._progress is not None:
                        self._progress(done, elements)
            finally:
                os.close(descriptor)
            self._written.append(self._directory / path)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Add up the fingerprints of the parts."""
        del metadata
        for result in (result for of_rank in results for result in of_rank):
            key = result.index.fqn
            self.fingerprints[key] = total((self.fingerprints.get(key, 0), result.storage_data))

    def _write(self, descriptor: int, item: WriteItem, values: torch.Tensor) -> tuple[int, int]:
        file, tensor = self._where[item.index.fqn]
        assert item.index.offset is not None
        offsets = tuple(item.index.offset)
        written, prints = 0, []
        direct = values.dtype == tensor.dtype and values.device.type == "cpu"
        for chunk, first in [(values.detach(), offsets)] if direct else slices(values, offsets, tensor.dtype):
            prints.append(fingerprint(chunk, first))
            written += put(descriptor, file.places[item.index.fqn], tensor, chunk, first)
        return written, total(prints)


def check_complete(where: Mapping[str, tuple[PlannedFile, StoredTensor]], held: Iterable[tuple[str, Any]]) -> None:
    """Raise `CheckpointError` unless rectangles, given as key and sizes, have all elements of every tensor."""
    written = dict.fromkeys(where, 0)
    for key, sizes in held:
        written[key] += math.prod(sizes)
    for key, count in written.items():
        expected = math.prod(where[key][1].shape)
        if count != expected:
            raise CheckpointError(f"{key} is incomplete: the ranks hold {count} of its {expected} elements")


def slices(
    values: torch.Tensor, offsets: Sequence[int], dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, tuple[int, ...]]]:
    """Yield a rectangle in parts of about `BUCKET_BYTES`, each on the CPU and in `dtype`, with its offsets.

    Tensors on the meta device stay there.
    """
    device = "meta" if values.device.type == "meta" else "cpu"
    rows = len(values) if values.dim() else 1
    row_bytes = max(1, values.numel() * dtype.itemsize // max(1, rows))
    first = tuple(offsets)
    for part in values.split(max(1, BUCKET_BYTES // row_bytes)) if values.dim() else (values,):
        yield part.detach().to(device=device, dtype=dtype), first
        if values.dim():
            first = (first[0] + len(part), *first[1:])


def allocate(path: Path, file: PlannedFile) -> None:
    """Create a file of its full size, with its header."""
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, max(1, file.size))
        os.pwrite(descriptor, file.header, 0)
    finally:
        os.close(descriptor)


def put(descriptor: int, place: int, tensor: StoredTensor, values: torch.Tensor, offsets: Sequence[int]) -> int:
    """Write a rectangle of `tensor`, whose data begins at byte `place`, and return the number of bytes written.

    Trailing dimensions that the rectangle fills completely are written contiguously.
    """
    if values.numel() == 0:
        return 0
    if values.dim() == 0:
        return _write_all(descriptor, values.reshape(1), place)
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(values.dim())]
    start = place + values.element_size() * sum(o * s for o, s in zip(offsets, strides))
    # `full`: the first dimension from which on the rectangle is as wide as the tensor.
    full = values.dim()
    while full > 0 and values.shape[full - 1] == tensor.shape[full - 1]:
        full -= 1
    outer = max(full - 1, 0)  # number of dimensions to iterate over
    written = 0
    for index in _indices(values.shape[:outer]):
        where = start + values.element_size() * sum(i * s for i, s in zip(index, strides))
        written += _write_all(descriptor, values[index], where)
    return written


def _indices(shape: Sequence[int]) -> Iterable[tuple[int, ...]]:
    return [()] if not shape else [(i, *rest) for i in range(shape[0]) for rest in _indices(shape[1:])]


def _write_all(descriptor: int, values: torch.Tensor, place: int) -> int:
    flat = values.contiguous().view(-1).view(torch.uint8)
    array: Any = flat.numpy()
    data = memoryview(array)
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + (1 << 30)], place + done)
    return done
