"""Which rectangles of stored tensors a run of a rank's shard consists of.

Data-parallel libraries cut a tensor-parallel shard further: FSDP2 by rows, ZeRO as a run of the flattened shard. Any of
these is a run of consecutive elements; with the `WeightLayout` it becomes rectangles of the tensors that a checkpoint
holds, so that each rank reads and writes its own elements and no others, at any sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from polyshard.core.weight_table import WeightEntry, stored_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A rectangle of a stored tensor, and where its elements lie in a rank's shard.

    Attributes:
        name: the stored tensor's.
        shape: the stored tensor's, whole.
        offsets: of the rectangle in the stored tensor.
        sizes: of the rectangle.
        run: start, in the flattened shard, of the box that contains the rectangle.
        box: that box's shape; its elements are consecutive.
        inner: offsets of the rectangle in the box.
        first: whether this rank is the first of those that hold these elements alike (shared KV heads, whole weights).
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    run: int
    box: tuple[int, ...]
    inner: tuple[int, ...]
    first: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def view(self, values: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The rectangle inside `values`, the flattened shard's elements from `start` on; a view of them."""
        begin = self.run - start
        result = values[begin : begin + math.prod(self.box)].view(self.box)
        for dim, (offset, size) in enumerate(zip(self.inner, self.sizes)):
            if size != self.box[dim]:
                result = result.narrow(dim, offset, size)
        return result


def regions(entry: WeightEntry, rank: int, size: int, start: int = 0, stop: int | None = None) -> list[Region]:
    """The rectangles that elements `start` to `stop` of a rank's flattened shard cover; padding is left out.

    Args:
        entry: of the parameter.
        rank: position along the tensor axis.
        size: of the tensor axis.
        start: first element.
        stop: one past the last; default the shard's end.
    """
    shape = entry.layout.local_shape(rank, size)
    stop = math.prod(shape) if stop is None else stop
    return [
        region
        for run, offsets, sizes in _boxes(shape, start, stop)
        for region in _in_stored(entry, rank, size, run, offsets, sizes)
    ]


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Boxes of consecutive elements that make up a run: first element, offsets and sizes."""
    if start >= stop:
        return
    if not shape:
        yield start, (), ()
        return
    if start == 0 and stop == math.prod(shape):
        yield 0, (0,) * len(shape), shape
        return
    if len(shape) == 1:
        yield start, (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        yield from _in_row(shape, start // row, row, start, stop)
        return
    yield from _in_row(shape, first - 1, row, start, first * row)
    if first < last:
        yield first * row, (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, row, last * row, stop)


def _in_row(
    shape: tuple[int, ...], index: int, row: int, start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    for run, offsets, sizes in _boxes(shape[1:], start - index * row, stop - index * row):
        yield run + index * row, (index, *offsets), (1, *sizes)


def _in_stored(
    entry: WeightEntry, rank: int, size: int, run: int, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterator[Region]:
    layout, count = entry.layout, len(entry.checkpoint_names)
    if layout.dim is None:
        yield Region(
            name=entry.checkpoint_names[0],
            shape=layout.shape,
            offsets=offsets,
            sizes=sizes,
            run=run,
            box=sizes,
            inner=(0,) * len(sizes),
            first=rank == 0,
        )
        return
    dim = layout.dim
    before = 0  # logical length of the segments before, where they are stored as one tensor
    for index, segment in enumerate(layout.segments):
        local, length = layout.local_offset(index, rank, size)
        logical = segment.local_range(rank, size)[0]
        begin, end = max(offsets[dim], local), min(offsets[dim] + sizes[dim], local + length)
        end = min(end, local + segment.size - logical)  # padding is stored nowhere
        if begin < end:
            place = logical + begin - local + (before if count == 1 else 0)
            yield Region(
                name=entry.checkpoint_names[0 if count == 1 else index],
                shape=stored_shape(layout, count, index),
                offsets=(*offsets[:dim], place, *offsets[dim + 1 :]),
                sizes=(*sizes[:dim], end - begin, *sizes[dim + 1 :]),
                run=run,
                box=sizes,
                inner=tuple(begin - offsets[dim] if d == dim else 0 for d in range(len(sizes))),
                first=rank % segment.replicas(size) == 0,
            )
        before += segment.size
