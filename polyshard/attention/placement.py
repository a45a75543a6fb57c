"""Boundaries and positions that a module takes where its caller gives none; under context parallel too."""

from __future__ import annotations

import torch

from polyshard.attention.context.shards import context_positions, context_shard
from polyshard.attention.packing import batch_of, pack
from polyshard.core.attention import PackedSequences
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError


def sequences_at(
    lead: torch.Size, cu_seqlens: torch.Tensor | None, context: ParallelContext, device: torch.device
) -> PackedSequences:
    """Boundaries of all context-parallel ranks' tokens, for local hidden states of shape `[*lead, hidden]`."""
    shards = context.axis("context").size
    if len(lead) == 2:
        if cu_seqlens is not None:
            raise ConfigurationError("cu_seqlens goes with packed [tokens, hidden] input, not with a batch")
        return batch_of(lead[0], lead[1] * shards, device)
    if cu_seqlens is None:
        return batch_of(1, lead[0] * shards, device)
    return pack(cu_seqlens, lead[0] * shards)


def positions_at(
    sequences: PackedSequences, lead: torch.Size, context: ParallelContext, device: torch.device
) -> torch.Tensor:
    """Position of each of this rank's tokens in its own sequence, int64 `[*lead]`."""
    shards = context.axis("context").size
    if len(lead) == 1:
        return context_positions(sequences, lead[0] * shards, context, device)
    return context_shard(torch.arange(lead[1] * shards, device=device), context).expand(lead)
