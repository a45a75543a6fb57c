"""Conversion of packed keys and values to cache blocks, and of a batch to chunks of queries. Does not import vLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

CPU_BLOCK = 32  # tokens per cache block; vLLM's CPU kernel requires a multiple
CUDA_BLOCK = 16  # vLLM's default on CUDA


@dataclass(frozen=True, slots=True)
class Blocks:
    """Positions of packed sequences in a paged cache that holds nothing else.

    Attributes:
        count: number of blocks.
        table: block numbers `[sequences, blocks of the longest]`; entries past a sequence's end are never read.
        slots: cache slot of each token, int64 `[tokens]`.
    """

    count: int
    table: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, bounds: torch.Tensor, size: int) -> Blocks:
        """Return the blocks for cumulative lengths `[sequences + 1]` and blocks of `size` tokens."""
        lengths = bounds.diff()
        blocks = (lengths + size - 1) // size
        first = blocks.cumsum(0) - blocks
        table = first[:, None] + torch.arange(max(1, int(blocks.max())), device=bounds.device)
        token = torch.arange(int(bounds[-1]), device=bounds.device) - bounds[:-1].repeat_interleave(lengths)
        slots = first.repeat_interleave(lengths) * size + token
        return cls(int(blocks.sum()), table, slots.to(torch.int64))


def pad_last_dim(t: torch.Tensor, size: int) -> torch.Tensor:
    """Pad the last dimension with zeros to `size`; return the tensor itself if it has that size."""
    return t if t.shape[-1] == size else F.pad(t, (0, size - t.shape[-1]))


def page_keys_values(
    k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page keys and values `[tokens, heads, dim]`; return both as `[blocks, size, heads, dim]`, and the block table.

    The block table is int32 `[sequences, blocks]`.
    """
    blocks = Blocks.of(bounds, size)
    slots = blocks.slots.to(k.device)
    cached = tuple(t.new_zeros(blocks.count * size, *t.shape[1:]).index_copy(0, slots, t) for t in (k, v))
    k, v = (t.unflatten(0, (blocks.count, size)) for t in cached)
    return k, v, blocks.table.to(k.device, torch.int32)


def split_queries(
    bounds: torch.Tensor, key_counts: torch.Tensor, table: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split sequences into chunks of at most `size` queries over the same keys.

    Args:
        bounds: int `[sequences + 1]`, cumulative numbers of queries.
        key_counts: int `[sequences]`, number of keys up to each sequence's last query.
        table: int block table `[sequences, blocks]`.
        size: maximum number of queries in a chunk.

    Returns:
        The same three tensors with one entry per chunk.
    """
    lengths = bounds.diff()
    if int(lengths.max()) <= size:
        return bounds, key_counts, table
    chunks = (lengths + size - 1) // size
    sequence = torch.arange(len(lengths), device=bounds.device).repeat_interleave(chunks)
    number = torch.arange(len(sequence), device=bounds.device) - (chunks.cumsum(0) - chunks)[sequence]
    ends = torch.minimum((number + 1) * size, lengths[sequence])  # relative to the sequence
    split = torch.cat((bounds[:1], bounds[:-1][sequence] + ends)).to(bounds.dtype)
    return split, (key_counts[sequence] - lengths[sequence] + ends).to(key_counts.dtype), table[sequence].contiguous()
