"""Copies from shards into buffers of full tensors, and from these into the shards of another model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from polyshard.core.context import ParallelContext, holder_axis
from polyshard.core.pieces import WEIGHT, Piece, replicated_piece
from polyshard.core.weight_table import WeightTable, collect_layouts
from polyshard.weights.fingerprint import fingerprint, total
from polyshard.weights.regions import Region, regions


@dataclass(frozen=True, slots=True)
class Moved:
    """A rectangle that was written into a shard, with the fingerprint of the result.

    Attributes:
        name: name of the stored tensor.
        offsets: offsets of the rectangle in the stored tensor.
        sizes: sizes of the rectangle.
        first: whether this rank is the first of those that hold it.
        print: the fingerprint.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: bool
    print: int


def module_pieces(module: nn.Module, context: ParallelContext) -> Iterator[Piece]:
    """Yield the parameters of a model as pieces, which are identical on all ranks that hold them."""
    table = collect_layouts(module)
    for name, parameter in module.named_parameters():
        yield replicated_piece(name, WEIGHT, parameter.detach().contiguous(), holder_axis(context, table[name].layout))


def shared_run(piece: Piece, shape: Sequence[int]) -> tuple[int, int]:
    """Return the run of a piece that this rank writes; replicas of a piece share the work by whole rows."""
    start, stop = piece.start, piece.start + len(piece.values)
    row = math.prod(shape[1:])
    rows = len(piece.values) // row if row else 0
    if piece.holders == 1:
        return start, stop
    if rows * row != len(piece.values) or rows < piece.holders or piece.values.nbytes < 1 << 16:
        return (start, stop) if piece.holder == 0 else (start, start)  # too small to split
    first, last = (rows * i // piece.holders for i in (piece.holder, piece.holder + 1))
    return start + first * row, start + last * row


def rectangle(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """Return a view of a rectangle of a tensor."""
    return tensor[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))]


def put_pieces(
    pieces: Iterable[tuple[Piece, int, int]],
    table: WeightTable,
    tensor_rank: int,
    tensor_size: int,
    buffers: Mapping[str, torch.Tensor],
) -> dict[str, int]:
    """Copy this rank's part of each buffered tensor into its buffer, converting the dtype.

    Args:
        pieces: each with the run that this rank writes (first element, one past the last).
        table: the model's weight table.
        tensor_rank: position along the tensor axis.
        tensor_size: size of the tensor axis.
        buffers: full tensors, by checkpoint name; tensors without a buffer are skipped.

    Returns:
        For each tensor, the fingerprint of this rank's part as stored in the buffer.
    """
    prints: dict[str, list[int]] = {}
    for piece, start, stop in pieces:
        entry = table[piece.parameter]
        if not any(name in buffers for name in entry.checkpoint_names):
            continue
        for region in regions(entry, tensor_rank, tensor_size, start, stop):
            if region.first and region.name in buffers:
                target = rectangle(buffers[region.name], region.offsets, region.sizes)
                target.copy_(region.view(piece.values, piece.start))
                prints.setdefault(region.name, []).append(fingerprint(target, region.offsets))
    return {name: total(parts) for name, parts in prints.items()}


def take_region(region: Region, shard: torch.Tensor, values: torch.Tensor) -> Moved:
    """Write one rectangle into a flattened shard."""
    target = region.view(shard)
    target.copy_(values)
    stands = target if target.dtype == values.dtype else target.to(values.dtype)  # a server may keep a bias in fp32
    return Moved(region.name, region.offsets, region.sizes, region.first, fingerprint(stands, region.offsets))
