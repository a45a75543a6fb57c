"""Default sequence boundaries and positions, also under context parallel."""

from __future__ import annotations

import torch

from polyshard.attention.context_parallel.shards import context_positions, context_shard
from polyshard.attention.packing import batch_of, pack
from polyshard.attention.rotary import RotaryEmbedding
from polyshard.core.attention import PackedSequences
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.parallel_layout import ParallelLayout


def sequences_at(
    lead: torch.Size, cu_seqlens: torch.Tensor | None, context: ParallelContext, device: torch.device
) -> PackedSequences:
    """Return the boundaries of the tokens of all context-parallel ranks, for local input of shape `[*lead, hidden]`.

    Raises:
        ConfigurationError: `cu_seqlens` is given for a batch, or is invalid, or `lead` has neither one nor two
            dimensions.
    """
    shards = context.axis("context").size
    if len(lead) not in (1, 2):
        raise ConfigurationError(
            f"the input has the wrong shape: got tokens {tuple(lead)}, expected [batch, seq] or packed [tokens]."
        )
    if len(lead) == 2:
        if cu_seqlens is not None:
            raise ConfigurationError(
                "cu_seqlens is unsupported for a batch: got input [batch, seq], expected packed [tokens]. Pack the "
                "sequences, or omit cu_seqlens."
            )
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
    """Return cosine and sine for this rank's tokens, in the dtype and on the device of `like`.

    Positions start from 0 in each sequence by default.
    """
    if positions is None:
        if sequences is None:
            raise ConfigurationError("positions are missing: a server must pass them. Pass positions to forward.")
        positions = positions_at(sequences, lead, context, like.device)
    return rotary(positions, like.dtype)


def positions_at(
    sequences: PackedSequences, lead: torch.Size, context: ParallelContext, device: torch.device
) -> torch.Tensor:
    """Return the position of each of this rank's tokens in its sequence, int64 `[*lead]`."""
    shards = context.axis("context").size
    if len(lead) == 1:
        return context_positions(sequences, lead[0] * shards, context, device)
    return context_shard(torch.arange(lead[1] * shards, device=device), context).expand(lead)


def sequence_positions(
    input_ids: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    parallel_context: ParallelContext | None = None,
) -> torch.Tensor:
    """Return the position of each token in its sequence.

    Args:
        input_ids: `[batch, seq]`, or packed `[tokens]`; under context parallel this rank's part.
        cu_seqlens: int32 `[sequences + 1]`, the boundaries of packed tokens of all context-parallel ranks; default: one
            sequence.
        parallel_context: the parallel context; required only under context parallel.

    Returns:
        int64 positions in the shape of `input_ids`.

    Raises:
        ConfigurationError: `cu_seqlens` is given for a batch, or is invalid.

    Examples:
        >>> sequence_positions(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 2, 5]))
        tensor([0, 1, 0, 1, 2])
    """
    context = parallel_context or GroupContext(layout=ParallelLayout(), device=input_ids.device, linear=None)
    sequences = sequences_at(input_ids.shape, cu_seqlens, context, input_ids.device)
    return positions_at(sequences, input_ids.shape, context, input_ids.device)
