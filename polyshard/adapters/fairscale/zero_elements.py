"""How many elements FairScale's OSS and ShardedDataParallel hold on a rank, for plans of memory.

Source: `fairscale/optim/oss.py` and `fairscale/nn/data_parallel/sharded_ddp.py` of 0.4.13.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache

from polyshard.core.zero_elements import ZeroElements, ZeroQuestion

REDUCE_BUFFER_SIZE = 2**23  # elements, the default of ShardedDataParallel


def zero_elements(question: ZeroQuestion, buffer: int = REDUCE_BUFFER_SIZE) -> ZeroElements:
    """Return the elements of the rank that holds the most.

    OSS gives each parameter to one rank, so that shares are unequal, and sends updated parameters from where they lie.
    At stage 1, DDP keeps all gradients in its buckets, and those of earlier micro-batches beside them. At stage 2,
    ShardedDataParallel keeps a buffer for each rank, which holds that rank's smallest parameters; other gradients are
    freed where they are not owned.

    Args:
        question: the run.
        buffer: `reduce_buffer_size` of ShardedDataParallel, in elements.
    """
    dense, expert = tuple(question.dense), tuple(question.expert)
    shares, holders = _shares(dense, question.replicas), _shares(expert, question.holders)
    owned = max(map(sum, shares)) + max(map(sum, holders))
    several, total = question.micro_batches > 1, sum(dense)
    if question.stage == 1:
        return ZeroElements(
            owned=owned, gradients=total + sum(expert), reducing=total if several else 0, updating=owned
        )
    size = min(buffer, total + sum(expert) + question.frozen)
    alone = [_unbuffered(share, size) for share in shares]
    kept = sum(map(sum, alone)) if several else max(map(sum, alone))
    buffers = total - sum(map(sum, alone))
    return ZeroElements(
        owned=owned,
        gradients=buffers + kept + sum(expert),
        reducing=max((max(share, default=0) for share in alone), default=0),
        updating=owned,
    )


@lru_cache(maxsize=256)  # a plan asks for every precision, recomputation and number of micro-batches
def _shares(sizes: tuple[int, ...], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Return the sizes of each rank's parameters: each goes to the first rank with the fewest elements."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for size in sizes:
        held, rank = heap[0]
        shares[rank].append(size)
        heapq.heapreplace(heap, (held + size, rank))
    return tuple(map(tuple, shares))


def _unbuffered(share: Sequence[int], buffer: int) -> list[int]:
    """Return the sizes that find no place in a rank's buffer, which is filled with its smallest parameters first."""
    left, filled = [], 0
    for size in sorted(share):
        if filled + size < buffer:
            filled += size
        else:
            left.append(size)
    return left
