"""Values from the shards of one side to the whole tensors of a buffer, and from there into the shards of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.pieces import WEIGHT, Piece, held_alike
from polyshard.core.weight_table import WeightTable
from polyshard.weights.fingerprint import fingerprint, total
from polyshard.weights.regions import Region, regions


@dataclass(frozen=True, slots=True)
class Moved:
    """A rectangle that was written, with the fingerprint of what then stood there.

    Attributes:
        name: of the stored tensor.
        offsets: in it.
        sizes: of the rectangle.
        first: whether this rank is the first of those that hold it.
        print: the fingerprint.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: bool
    print: int


def module_pieces(module: nn.Module, context: ParallelContext) -> Iterator[Piece]:
    """A model's parameters as pieces; its replicas hold them alike."""
    axis = replica_axis(context)
    for name, parameter in module.named_parameters():
        yield held_alike(name, WEIGHT, parameter.detach().contiguous(), axis)


def shared_run(piece: Piece, shape: Sequence[int]) -> tuple[int, int]:
    """The part of a piece that this rank writes where several hold it alike: whole rows, in turn."""
    start, stop = piece.start, piece.start + len(piece.values)
    row = math.prod(shape[1:])
    rows = len(piece.values) // row if row else 0
    if piece.holders == 1:
        return start, stop
    if rows * row != len(piece.values) or rows < piece.holders or piece.values.nbytes < 1 << 16:
        return (start, stop) if piece.holder == 0 else (start, start)  # not worth cutting
    first, last = (rows * i // piece.holders for i in (piece.holder, piece.holder + 1))
    return start + first * row, start + last * row


def rectangle(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """A view of a part of a tensor."""
    return tensor[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))]


def put_pieces(
    pieces: Iterable[tuple[Piece, int, int]],
    table: WeightTable,
    tensor_rank: int,
    tensor_size: int,
    buffers: Mapping[str, torch.Tensor],
) -> dict[str, int]:
    """Write what this rank holds of each buffered tensor into it, converting the dtype.

    Args:
        pieces: with the run of each that this rank is to write (first element, one past the last).
        table: of the model.
        tensor_rank: position along the tensor axis.
        tensor_size: of the tensor axis.
        buffers: whole tensors by stored name; others are passed over.

    Returns:
        For each tensor the fingerprint of this rank's part as it stands in the buffer.
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
    stands = target if target.dtype == values.dtype else target.to(values.dtype)  # a server may keep a bias wider
    return Moved(region.name, region.offsets, region.sizes, region.first, fingerprint(stands, region.offsets))
