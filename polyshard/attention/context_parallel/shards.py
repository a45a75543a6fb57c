"""Which tokens a rank of the context axis holds: the r-th and the r-th last of 2n equal pieces.

So every rank has as much of a causal mask's work. A batch is cut along the sequence, row by row; a packed batch as one
row, wherever its sequences begin.
"""

from __future__ import annotations

import torch

from polyshard.attention.packing import positions_of
from polyshard.core.attention import PackedSequences
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.errors import ConfigurationError


def context_shard(tensor: torch.Tensor, parallel_context: ParallelContext, dim: int = 0) -> torch.Tensor:
    """This rank's part of a whole tensor along the tokens' dimension (0 for packed tokens, 1 for a batch).

    Raises:
        ConfigurationError: the tokens are not a multiple of twice the ranks.
    """
    axis = parallel_context.axis("context")
    if axis.size == 1:
        return tensor
    pieces = _pieces_of_row(0, tensor.shape[dim], axis.size, axis.rank)
    return torch.cat([tensor.narrow(dim, first, last - first) for first, last in pieces], dim=dim)


def context_unshard(tensor: torch.Tensor, parallel_context: ParallelContext, dim: int = 0) -> torch.Tensor:
    """The whole tensor from every rank's part; not differentiable."""
    axis = parallel_context.axis("context")
    if axis.size == 1:
        return tensor
    assert axis.collectives is not None
    gathered = axis.collectives.all_gather(tensor.detach(), dim)
    return gathered.index_select(dim, order_of_ranks(1, gathered.shape[dim], axis.size, tensor.device).argsort())


def context_positions(
    sequences: PackedSequences, tokens: int, parallel_context: ParallelContext, device: torch.device
) -> torch.Tensor:
    """Position, in its own sequence, of each of this rank's packed tokens; `tokens` is their whole number."""
    return context_shard(positions_of(sequences, tokens, device), parallel_context)


def pieces_of(rows: int, length: int, axis: ParallelAxis, rank: int) -> list[tuple[int, int]]:
    """Global `[first, last)` of each piece that a rank holds, in the order in which it holds them."""
    return [piece for row in range(rows) for piece in _pieces_of_row(row * length, length, axis.size, rank)]


def order_of_ranks(rows: int, length: int, size: int, device: torch.device) -> torch.Tensor:
    """Global index of each token where all ranks' tokens lie end to end, int64."""
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
            f"{length} tokens cannot be cut for context-parallel size {size}: pad them to a multiple of {2 * size}"
        )
    piece = length // (2 * size)
    return [(start + i * piece, start + (i + 1) * piece) for i in (rank, 2 * size - 1 - rank)]
