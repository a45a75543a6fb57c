"""Checked sequence boundaries."""

from __future__ import annotations

from itertools import pairwise

import torch

from polyshard.core.attention import PackedSequences
from polyshard.core.errors import ConfigurationError


def batch_of(batch: int, length: int, device: torch.device) -> PackedSequences:
    """The boundaries of `batch` sequences of one length."""
    cu_seqlens = torch.arange(0, (batch + 1) * length, max(length, 1), dtype=torch.int32, device=device)
    return PackedSequences(cu_seqlens[: batch + 1], (length,) * batch)


def packed(cu_seqlens: torch.Tensor, tokens: int) -> PackedSequences:
    """Boundaries from cumulative lengths.

    Args:
        cu_seqlens: integer `[sequences + 1]`; begins with 0, does not fall, and ends with `tokens`.
        tokens: number of packed tokens.

    Raises:
        ConfigurationError: it is not that.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ConfigurationError(
            f"cu_seqlens must be integers [sequences + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.tolist()
    lengths = tuple(b - a for a, b in pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ConfigurationError(
            f"cu_seqlens must rise from 0 to the {tokens} tokens given, got {bounds[:8]} ending in {bounds[-1]}"
        )
    return PackedSequences(cu_seqlens.to(torch.int32), lengths)


def positions_of(sequences: PackedSequences, device: torch.device) -> torch.Tensor:
    """Position of each packed token in its own sequence, int64 `[tokens]`."""
    if not sequences.lengths:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat([torch.arange(length, device=device) for length in sequences.lengths])


def sequence_positions(input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Position of each token in its own sequence.

    Args:
        input_ids: `[batch, seq]`, or packed `[tokens]`.
        cu_seqlens: int32 `[sequences + 1]` of packed tokens; default one sequence.

    Returns:
        int64, the shape of `input_ids`.
    """
    if input_ids.dim() == 2:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if cu_seqlens is None:
        return torch.arange(input_ids.shape[0], device=input_ids.device)
    return positions_of(packed(cu_seqlens, input_ids.shape[0]), input_ids.device)
