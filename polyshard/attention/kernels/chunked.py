"""Attention in chunks of queries, by matrix products with a hand-written backward: what no flash kernel offers.

Runs on any device and float dtype. Memory is linear in the length: the backward computes the weights of a chunk again
from the logsumexp. Grouped-query heads are folded into rows, so that keys and values are never repeated.

Dropout is drawn for each global query head and chunk from one number: a run is reproducible, and it does not depend on
how heads are spread over tensor-parallel ranks that were given the same number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from polyshard.core.attention import AttentionSpec, PackedSequences

_ROWS = 256  # queries of one chunk


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries `[first, last)` and the keys `[low, high)` that they may see."""

    first: int
    last: int
    low: int
    high: int


def _chunks(lengths: tuple[int, ...], spec: AttentionSpec) -> Iterator[_Chunk]:
    start = 0
    for length in lengths:
        end = start + length
        for first in range(start, end, _ROWS):
            last = min(first + _ROWS, end)
            low, high = start, last if spec.causal else end
            if spec.sliding_window is not None:
                low = max(start, first - spec.sliding_window + 1)
                if not spec.causal:
                    high = min(end, last + spec.sliding_window - 1)
            yield _Chunk(first, last, low, high)
        start = end


def _fold(x: torch.Tensor, chunk: _Chunk, kv_heads: int) -> torch.Tensor:
    """`[tokens, heads, dim]` to `[kv_heads, group * rows, dim]` of a chunk's queries."""
    rows = x[chunk.first : chunk.last].unflatten(1, (kv_heads, -1))  # [rows, kv_heads, group, dim]
    return rows.permute(1, 2, 0, 3).flatten(1, 2)


def _unfold(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`[kv_heads, group * rows, dim]` to `[rows, heads, dim]`."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def _hidden(chunk: _Chunk, spec: AttentionSpec, device: torch.device) -> torch.Tensor | None:
    """`[rows, keys]`, True where a key is masked; None where nothing is."""
    if not spec.causal and spec.sliding_window is None:
        return None
    distance = (
        torch.arange(chunk.first, chunk.last, device=device)[:, None]
        - torch.arange(chunk.low, chunk.high, device=device)[None]
    )
    mask = distance < 0 if spec.causal else torch.zeros_like(distance, dtype=torch.bool)
    if spec.sliding_window is not None:
        mask |= distance.abs() >= spec.sliding_window
    return mask


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Scaled and masked `q kᵀ`, `[kv_heads, group * rows, keys]`, in float32 or wider."""
    scores = q @ k.transpose(1, 2)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if mask is not None:
        scores.unflatten(1, (-1, mask.shape[0])).masked_fill_(mask, -math.inf)
    return scores


def _kept(like: torch.Tensor, spec: AttentionSpec, chunk: _Chunk, seed: int) -> torch.Tensor:
    """Dropout's factors, 0 or 1 / (1 - p): `[kv_heads, group * rows, keys]`."""
    rows = chunk.last - chunk.first
    factors = []
    for head in range(spec.num_heads):
        generator = torch.Generator(device=like.device)
        generator.manual_seed(hash((seed, spec.head_offset + head, chunk.first)) & (2**62 - 1))
        keep = torch.empty(rows, like.shape[-1], device=like.device, dtype=like.dtype)
        factors.append(keep.bernoulli_(1.0 - spec.dropout, generator=generator))
    kept = torch.stack(factors).div_(1.0 - spec.dropout)
    return kept.view(like.shape)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: tuple[int, ...],
        spec: AttentionSpec,
        seed: int | None,
    ) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        logsumexps = []
        for chunk in _chunks(lengths, spec):
            keys, values = (t[chunk.low : chunk.high].transpose(0, 1) for t in (k, v))
            scores = _scores(_fold(q, chunk, spec.num_kv_heads), keys, _hidden(chunk, spec, q.device), spec.scale)
            logsumexp = scores.logsumexp(-1, keepdim=True)
            weights = scores.sub_(logsumexp).exp_()
            if seed is not None:
                weights = weights * _kept(weights, spec, chunk, seed)
            out[chunk.first : chunk.last] = _unfold(weights.to(v.dtype) @ values, chunk.last - chunk.first)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(q, k, v, out, *logsumexps)
        ctx.lengths, ctx.spec, ctx.seed = lengths, spec, seed
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *logsumexps = ctx.saved_tensors
        spec: AttentionSpec = ctx.spec
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k = torch.zeros(k.shape, dtype=wide, device=k.device)
        grad_v = torch.zeros(v.shape, dtype=wide, device=v.device)
        # rowsum(dO ∘ O) = rowsum(dP ∘ P), with dropout too (FlashAttention, appendix B)
        delta = (gradients[0].to(wide) * out.to(wide)).sum(-1, keepdim=True)
        for chunk, logsumexp in zip(_chunks(ctx.lengths, spec), logsumexps):
            rows = chunk.last - chunk.first
            keys, values = (t[chunk.low : chunk.high].transpose(0, 1) for t in (k, v))
            queries, grad_out, row_delta = (_fold(t, chunk, spec.num_kv_heads) for t in (q, gradients[0], delta))
            scores = _scores(queries, keys, _hidden(chunk, spec, q.device), spec.scale)
            weights = scores.sub_(logsumexp).exp_()
            grad_weights = (grad_out @ values.transpose(1, 2)).to(wide)
            dropped = weights
            if ctx.seed is not None:
                kept = _kept(weights, spec, chunk, ctx.seed)
                dropped, grad_weights = weights * kept, grad_weights * kept
            grad_v[chunk.low : chunk.high] += (dropped.to(q.dtype).transpose(1, 2) @ grad_out).transpose(0, 1)
            grad_scores = ((grad_weights - row_delta) * weights * spec.scale).to(q.dtype)
            grad_q[chunk.first : chunk.last] = _unfold(grad_scores @ keys, rows)
            grad_k[chunk.low : chunk.high] += (grad_scores.transpose(1, 2) @ queries).transpose(0, 1)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


class Chunked:
    """The kernel that has every feature, and takes what the faster ones reject."""

    name = "chunked"

    def rejects(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """See `AttentionKernel`."""
        return None if dtype.is_floating_point else f"needs a float dtype, not {dtype}"

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: PackedSequences,
        spec: AttentionSpec,
        training: bool,
    ) -> torch.Tensor:
        """See `AttentionKernel`."""
        seed = None
        if spec.dropout and training:
            seed = int(torch.randint(2**62, (), device="cpu"))  # from torch's global generator: reproducible
        return _Chunked.apply(q, k, v, sequences.lengths, spec, seed)
