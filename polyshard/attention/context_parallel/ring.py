"""Ring attention: keys and values are passed around the ranks, and partial results are merged by their logsumexps.

The backward pass passes them around again, together with their gradients. Sums are taken in a different order than in
a single process, so that results agree within rounding.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyshard.attention.context_parallel.shards import pieces_of
from polyshard.attention.kernels.protocol import AttentionCall, BlockKernel
from polyshard.attention.kernels.softmax import sinks_gradient, wide, with_sinks
from polyshard.attention.packing import of_lengths
from polyshard.core.context import ParallelAxis
from polyshard.layers.forward_gradients import without_autocast

Piece = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Ring:
    """The data that all steps of one ring attention share.

    Attributes:
        call: the attention call as in a single process.
        axis: the context axis.
        bounds: cumulative lengths of all sequences, over the tokens of all ranks.
        pieces: for each rank the ranges of global tokens that it holds.
        kernel: the kernel that runs each step.
    """

    call: AttentionCall
    axis: ParallelAxis
    bounds: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    kernel: BlockKernel


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    sinks: torch.Tensor | None,
    axis: ParallelAxis,
    rows: int,
    kernel: BlockKernel,
) -> torch.Tensor:
    """Compute the attention of this rank's tokens, as `ulysses_attention`.

    `call.queries` are the boundaries of the tokens of all ranks.
    """
    length = q.shape[0] * axis.size // rows
    pieces = tuple(tuple(pieces_of(rows, length, axis, rank)) for rank in range(axis.size))
    bounds = tuple(call.queries.host.tolist())
    return _RingAttention.apply(q, k, v, sinks, Ring(call, axis, bounds, pieces, kernel))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, ring: Ring
    ) -> torch.Tensor:
        out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=wide(q.dtype), device=q.device)
        total = torch.full(q.shape[:2], -math.inf, dtype=wide(q.dtype), device=q.device)
        held = (k, v)
        for step in range(ring.axis.size):
            for rows, seen, call in _blocks(ring, step, q.device):
                with without_autocast(q.device.type):  # as in the operator of a single rank
                    part, logsumexp, _ = ring.kernel.forward(q[rows], held[0][seen], held[1][seen], call)
                _merge(out[rows], total[rows], part, logsumexp)
            if step + 1 < ring.axis.size:
                held = _rotated(held, ring.axis)
        if sinks is not None:
            out, total = with_sinks(out, total, sinks)
        narrow = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, narrow, total, sinks)
        ctx.ring = ring
        return narrow

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, total, sinks = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad_out = gradients[0].contiguous()
        none = q.new_empty(0)
        grad_q = torch.zeros(q.shape, dtype=total.dtype, device=q.device)
        held = (k, v)
        sums = tuple(torch.zeros(t.shape, dtype=total.dtype, device=t.device) for t in held)
        for step in range(ring.axis.size):
            for rows, seen, call in _blocks(ring, step, q.device):
                tensors = (q[rows], held[0][seen], held[1][seen], out[rows], total[rows])
                with without_autocast(q.device.type):
                    parts = ring.kernel.backward(grad_out[rows], *tensors, none, call)
                for target, part in zip((grad_q[rows], sums[0][seen], sums[1][seen]), parts):
                    target += part
            if step + 1 < ring.axis.size:
                held = _rotated(held, ring.axis)
            sums = _rotated(sums, ring.axis)  # after one step for each rank they are back on their own rank
        grad_sinks = None if sinks is None else sinks_gradient(grad_out, out, total, sinks)
        return grad_q.to(q.dtype), sums[0].to(k.dtype), sums[1].to(v.dtype), grad_sinks, None


def _merge(out: torch.Tensor, total: torch.Tensor, part: torch.Tensor, logsumexp: torch.Tensor) -> None:
    """Merge a partial result into `out` and its logsumexp into `total`, in place."""
    joined = torch.logaddexp(total, logsumexp)
    least = torch.finfo(joined.dtype).min
    safe = joined.clamp_min(least)  # joined is -inf for queries that have seen no key yet
    out.mul_((total - safe).exp().unsqueeze(-1)).add_(part * (logsumexp - safe).exp().unsqueeze(-1))
    total.copy_(joined)


def _rotated(tensors: tuple[torch.Tensor, ...], axis: ParallelAxis) -> tuple[torch.Tensor, ...]:
    """Return the previous rank's tensors, received in one message."""
    exchange: Any = axis.collectives
    flat = exchange.rotate(torch.cat([t.reshape(-1) for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors))


def _blocks(ring: Ring, step: int, device: torch.device) -> Iterator[tuple[slice, slice, AttentionCall]]:
    """Yield a slice of this rank's queries, a slice of the keys that it holds at `step`, and the call for them."""
    rank = ring.axis.rank
    mine, theirs = ring.pieces[rank], ring.pieces[(rank - step) % ring.axis.size]
    row = 0
    for queries in mine:
        place = 0
        for keys in theirs:
            block = _block(ring, queries, keys, device)
            if block is not None:
                first, last, call = block
                yield slice(row, row + queries[1] - queries[0]), slice(place + first, place + last), call
            place += keys[1] - keys[0]
        row += queries[1] - queries[0]


def _block(ring: Ring, queries: Piece, keys: Piece, device: torch.device) -> tuple[int, int, AttentionCall] | None:
    """Return the range `[first, last)` of the keys that the queries see, and the call; None if they see no key."""
    spec = ring.call.spec
    if spec.causal and keys[0] >= queries[1]:
        return None
    rows, seen, starts, key_starts = [], [], [], []
    for first, last in zip(ring.bounds, ring.bounds[1:]):
        start, end = max(first, queries[0]), min(last, queries[1])
        key_start, key_end = max(first, keys[0]), min(last, keys[1])
        if start >= end:
            continue
        rows.append(end - start)
        seen.append(max(0, key_end - key_start))
        starts.append(start)
        key_starts.append(key_start)
    if not any(seen):
        return None
    met = [(start, start + count) for start, count in zip(key_starts, seen) if count]
    masked = spec.causal and keys == queries
    call = replace(
        ring.call,
        spec=replace(spec, causal=masked or (spec.causal and spec.sliding_window is not None)),
        queries=of_lengths(rows, device),
        keys=of_lengths(seen, device),
        shifts=tuple(q - k for q, k in zip(starts, key_starts)),
        query_ids=tuple(starts),
        key_ids=tuple(key_starts),
    )
    return met[0][0] - keys[0], met[-1][1] - keys[0], call
