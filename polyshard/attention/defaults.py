"""Boundaries and positions that a module takes where its caller gives none; under context parallel too."""

from __future__ import annotations

import torch

from polyshard.attention.context_parallel.shards import context_positions, context_shard
from polyshard.attention.packing import batch_of, pack
from polyshard.attention.rotary import RotaryEmbedding
from polyshard.core.attention import PackedSequences
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.layout import ParallelLayout


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


def rotary_at(
    rotary: RotaryEmbedding,
    positions: torch.Tensor | None,
    sequences: PackedSequences | None,
    lead: torch.Size,
    context: ParallelContext,
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for this rank's tokens, in the dtype and on the device of `like`; positions from 0 by default."""
    if positions is None:
        if sequences is None:
            raise ConfigurationError("a serving engine has to pass positions")
        positions = positions_at(sequences, lead, context, like.device)
    return rotary(positions, like.dtype)


def positions_at(
    sequences: PackedSequences, lead: torch.Size, context: ParallelContext, device: torch.device
) -> torch.Tensor:
    """Position of each of this rank's tokens in its own sequence, int64 `[*lead]`."""
    shards = context.axis("context").size
    if len(lead) == 1:
        return context_positions(sequences, lead[0] * shards, context, device)
    return context_shard(torch.arange(lead[1] * shards, device=device), context).expand(lead)


def sequence_positions(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    parallel_context: ParallelContext | None = None,
) -> torch.Tensor:
    """Position of each token in its own sequence.

    Args:
        input_ids: `[batch, seq]`, or packed `[tokens]`; under context parallel this rank's part.
        cu_seqlens: int32 `[sequences + 1]` of packed tokens, of all context-parallel ranks; default one sequence.
        parallel_context: where this process stands; needed under context parallel alone.

    Returns:
        int64, the shape of `input_ids`.
    """
    context = parallel_context or GroupContext(layout=ParallelLayout(), device=input_ids.device, linear=None)
    sequences = sequences_at(input_ids.shape, cu_seqlens, context, input_ids.device)
    return positions_at(sequences, input_ids.shape, context, input_ids.device)
