"""Sharding of tokens over the context axis: of 2n equal pieces, rank r of n holds piece r and piece 2n - 1 - r.

Every rank thereby has the same share of a causal mask's work. A batch is sharded along the sequence, row by row; packed
tokens are sharded as one row, regardless of where sequences begin.
"""

from __future__ import annotations

import torch

from polyshard.attention.packing import positions_of
from polyshard.core.attention import PackedSequences
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.errors import ConfigurationError


def context_shard(tensor: torch.Tensor, parallel_context: ParallelContext, dim: int = 0) -> torch.Tensor:
    """Return this rank's part of a tensor along its token dimension.

    Args:
        tensor: the full tensor, equal on all ranks of the context axis.
        parallel_context: the context with the context axis.
        dim: the token dimension: 0 for packed tokens, 1 for a batch.

    Returns:
        The shard, with `1 / context size` of the tokens; `tensor` itself if the axis has one rank.

    Raises:
        ConfigurationError: the number of tokens is not a multiple of twice the context-parallel size.

    Examples:
        >>> context_shard(torch.arange(8), ps.initialize("torch"))  # with two ranks, rank 0 gets 0, 1, 6, 7
        tensor([0, 1, 2, 3, 4, 5, 6, 7])
    """
    axis = parallel_context.axis("context")
    if axis.size == 1:
        return tensor
    pieces = _pieces_of_row(0, tensor.shape[dim], axis.size, axis.rank)
    return torch.cat([tensor.narrow(dim, first, last - first) for first, last in pieces], dim=dim)


def context_unshard(tensor: torch.Tensor, parallel_context: ParallelContext, dim: int = 0) -> torch.Tensor:
    """Gather the full tensor from the parts of all ranks. Not differentiable. A collective over the context axis.

    Args:
        tensor: this rank's part.
        parallel_context: the context with the context axis.
        dim: the token dimension: 0 for packed tokens, 1 for a batch.

    Examples:
        >>> context = ps.initialize("torch")
        >>> context_unshard(context_shard(torch.arange(4), context), context)
        tensor([0, 1, 2, 3])
    """
    axis = parallel_context.axis("context")
    if axis.size == 1:
        return tensor
    assert axis.collectives is not None
    gathered = axis.collectives.all_gather(tensor.detach(), dim)
    return gathered.index_select(dim, order_of_ranks(1, gathered.shape[dim], axis.size, tensor.device).argsort())


def context_positions(
    sequences: PackedSequences, tokens: int, parallel_context: ParallelContext, device: torch.device
) -> torch.Tensor:
    """Return the position of each of this rank's packed tokens in its sequence.

    Args:
        sequences: boundaries of the tokens of all ranks.
        tokens: number of tokens of all ranks.
        parallel_context: the context with the context axis.
        device: device of the result.

    Returns:
        int64 `[tokens / context size]`.

    Examples:
        >>> sequences = ps.pack(torch.tensor([0, 3, 5]), tokens=5)
        >>> context_positions(sequences, 5, ps.initialize("torch"), torch.device("cpu"))
        tensor([0, 1, 2, 0, 1])
    """
    return context_shard(positions_of(sequences, tokens, device), parallel_context)


def pieces_of(rows: int, length: int, axis: ParallelAxis, rank: int) -> list[tuple[int, int]]:
    """Return the global range `[first, last)` of each piece that a rank holds, in the order of its local tokens."""
    return [piece for row in range(rows) for piece in _pieces_of_row(row * length, length, axis.size, rank)]


def order_of_ranks(rows: int, length: int, size: int, device: torch.device) -> torch.Tensor:
    """Return the global indices of the tokens of all ranks, concatenated in rank order, int64."""
    runs = [
        torch.arange(*piece, device=device)
        for rank in range(size)
        for row in range(rows)
        for piece in _pieces_of_row(row * length, length, size, rank)
    ]
    return torch.cat(runs)


def _pieces_of_row(start: int, length: int, size: int, rank: int) -> list[tuple[int, int]]:
    if length % (2 * size):
        raise ConfigurationError(
            f"The number of tokens cannot be divided over context-parallel size {size}: got {length}, expected a "
            f"multiple of {2 * size}. Pad the tokens."
        )
    piece = length // (2 * size)
    return [(start + i * piece, start + (i + 1) * piece) for i in (rank, 2 * size - 1 - rank)]
