"""The rectangles of stored tensors that make up a run of a rank's shard.

Data-parallel libraries cut a tensor-parallel shard further: FSDP2 by rows, ZeRO into runs of the flattened shard. Each
part is a run of consecutive elements. The `WeightLayout` maps it to rectangles of the tensors in a checkpoint, so each
rank reads and writes only its own elements, at any parallel sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from polyshard.core.weight_table import WeightEntry, stored_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A rectangle of a stored tensor, and the position of its elements in a rank's shard.

    Attributes:
        name: name of the stored tensor.
        shape: full shape of the stored tensor.
        offsets: offsets of the rectangle in the stored tensor.
        sizes: sizes of the rectangle.
        run: start, in the flattened shard, of the box that contains the rectangle.
        box: shape of that box; its elements are consecutive.
        inner: offsets of the rectangle in the box.
        first: whether this rank is the first of those that hold these elements (shared KV heads, replicated weights).
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
        """Return a view of the rectangle in `values`, the elements of the flattened shard from `start` on."""
        begin = self.run - start
        result = values[begin : begin + math.prod(self.box)].view(self.box)
        for dim, (offset, size) in enumerate(zip(self.inner, self.sizes)):
            if size != self.box[dim]:
                result = result.narrow(dim, offset, size)
        return result


def regions(entry: WeightEntry, rank: int, size: int, start: int = 0, stop: int | None = None) -> list[Region]:
    """Return the rectangles that elements `start` to `stop` of a rank's flattened shard cover, without padding.

    Args:
        entry: entry of the parameter in the weight table.
        rank: position along the tensor axis.
        size: size of the tensor axis.
        start: first element.
        stop: one past the last element; the end of the shard by default.

    Examples:
        >>> table = ps.collect_layouts(torch.nn.Linear(2, 3, bias=False))
        >>> [(region.offsets, region.sizes) for region in regions(table["weight"], 0, 1, start=1, stop=4)]
        [((0, 1), (1, 1)), ((1, 0), (1, 2))]
    """
    shape = entry.layout.local_shape(rank, size)
    stop = math.prod(shape) if stop is None else stop
    return [
        region
        for run, offsets, sizes in _boxes(shape, start, stop)
        for region in _in_stored(entry, rank, size, run, offsets, sizes)
    ]


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield the boxes of consecutive elements that make up a run, as first element, offsets and sizes."""
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
    if first > last:  # the run is inside one row
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
    if layout.experts is not None:
        yield from _of_experts(entry, rank, size, run, offsets, sizes)
        return
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
    before = 0  # logical length of the preceding segments, if all are stored as one tensor
    for index, segment in enumerate(layout.segments):
        local, length = layout.local_offset(index, rank, size)
        logical = segment.local_range(rank, size)[0]
        begin, end = max(offsets[dim], local), min(offsets[dim] + sizes[dim], local + length)
        end = min(end, local + segment.size - logical)  # padding is not stored
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


def _of_experts(
    entry: WeightEntry, rank: int, size: int, run: int, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> Iterator[Region]:
    """Yield the rectangles of a box in this rank's experts, which are stored as one tensor or expert by expert."""
    layout, names = entry.layout, entry.checkpoint_names
    assert layout.experts is not None
    if len(names) == 1:
        local = replace(entry, layout=layout.of_local_experts())
        for region in _in_stored(local, rank, size, run, offsets, sizes):
            place = (region.offsets[0] + layout.experts.first, *region.offsets[1:])
            yield replace(region, shape=layout.shape, offsets=place)
        return
    each, row = len(layout.segments), math.prod(sizes[1:])
    for index in range(sizes[0]):
        expert = layout.experts.first + offsets[0] + index
        one = replace(entry, layout=layout.of_one_expert(), checkpoint_names=names[expert * each : (expert + 1) * each])
        yield from _in_stored(one, rank, size, run + index * row, offsets[1:], sizes[1:])
