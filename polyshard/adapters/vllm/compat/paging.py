"""Packed keys and values as blocks of a cache, and a batch as pieces of queries; imports nothing of vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

CPU_BLOCK = 32  # tokens of a cache block; vLLM's CPU kernel takes multiples of it
CUDA_BLOCK = 16  # vLLM's default on CUDA


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where packed sequences lie in a paged cache that holds nothing else.

    Attributes:
        count: of all blocks.
        table: `[sequences, blocks of the longest]`; entries past a sequence's end are never read.
        slots: int64 `[tokens]`.
    """

    count: int
    table: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, bounds: torch.Tensor, size: int) -> Blocks:
        """For cumulative lengths `[sequences + 1]` and blocks of `size` tokens."""
        lengths = bounds.diff()
        blocks = (lengths + size - 1) // size
        first = blocks.cumsum(0) - blocks
        table = first[:, None] + torch.arange(max(1, int(blocks.max())), device=bounds.device)
        token = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
        slots = first.repeat_interleave(lengths) * size + token
        return cls(int(blocks.sum()), table, slots.to(torch.int64))


def filled(t: torch.Tensor, size: int) -> torch.Tensor:
    """The last dimension filled up with zeros to `size`; nothing is copied where it has that size."""
    return t if t.shape[-1] == size else F.pad(t, (0, size - t.shape[-1]))


def paged(
    k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[tokens, heads, dim]` as `[blocks, size, heads, dim]`, and int32 `[sequences, blocks]`."""
    blocks = Blocks.of(bounds, size)
    slots = blocks.slots.to(k.device)
    cached = tuple(t.new_zeros(blocks.count * size, *t.shape[1:]).index_copy(0, slots, t) for t in (k, v))
    k, v = (t.unflatten(0, (blocks.count, size)) for t in cached)
    return k, v, blocks.table.to(k.device, torch.int32)


def cut_queries(
    bounds: torch.Tensor, seen: torch.Tensor, table: torch.Tensor, piece: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch whose sequences have at most `piece` queries each: longer ones become several over the same keys.

    Args:
        bounds: int `[sequences + 1]`, cumulative numbers of queries.
        seen: int `[sequences]`, keys up to each one's last query.
        table: int `[sequences, blocks]`.
        piece: queries.

    Returns:
        The same three of the pieces.
    """
    lengths = bounds.diff()
    if int(lengths.max()) <= piece:
        return bounds, seen, table
    pieces = (lengths + piece - 1) // piece
    sequence = torch.arange(len(lengths), device=bounds.device).repeat_interleave(pieces)
    number = torch.arange(len(sequence), device=bounds.device) - (pieces.cumsum(0) - pieces)[sequence]
    ends = torch.minimum((number + 1) * piece, lengths[sequence])  # in its sequence
    cut = torch.cat((bounds[:1], bounds[:-1][sequence] + ends)).to(bounds.dtype)
    return cut, (seen[sequence] - lengths[sequence] + ends).to(seen.dtype), table[sequence].contiguous()
