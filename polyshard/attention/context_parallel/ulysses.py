"""Ulysses: an all-to-all exchanges heads for tokens, so that each rank has all tokens for a part of the heads.

The kernel calls are those of a single process with fewer heads, so that the results have the same bits.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses". DeepSpeed's implementation (0.19) does not support packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from polyshard.attention.context_parallel.shards import order_of_ranks
from polyshard.core.attention import AttentionSpec
from polyshard.core.context import ParallelAxis
from polyshard.core.errors import ConfigurationError

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSpec, torch.Tensor | None], torch.Tensor]


def heads_divide(spec: AttentionSpec, size: int) -> bool:
    """Return whether the heads can be divided evenly over `size` ranks; several ranks may share a KV head."""
    return not (spec.num_heads % size or (spec.num_kv_heads % size and size % spec.num_kv_heads))


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    axis: ParallelAxis,
    rows: int,
    attend: Attend,
) -> torch.Tensor:
    """Compute the attention of this rank's tokens.

    Args:
        q: `[local tokens, heads, head_dim]`.
        k: `[local tokens, kv_heads, head_dim]`.
        v: `[local tokens, kv_heads, value_dim]`.
        spec: the request, for all heads.
        sinks: `[heads]`; None without sinks.
        axis: the context axis.
        rows: number of rows of the batch; 1 for packed tokens.
        attend: computes attention over the tokens of all ranks for a part of the heads.

    Returns:
        `[local tokens, heads, value_dim]`.

    Raises:
        ConfigurationError: the heads cannot be divided over the ranks.
    """
    size, rank = axis.size, axis.rank
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    if not heads_divide(spec, size):
        raise ConfigurationError(
            f"Ulysses cannot divide the heads: got {heads} query and {kv_heads} KV heads over {size} ranks, expected "
            "query heads that are a multiple of the ranks and KV heads that are a multiple or a divisor of them. Use "
            "context_parallel='ring'."
        )
    if kv_heads < size:  # several ranks share a KV head
        k, v = (t.repeat_interleave(size // kv_heads, dim=1) for t in (k, v))
    order = order_of_ranks(rows, q.shape[0] * size // rows, size, q.device)
    back = order.argsort()
    q, k, v = (_Exchange.apply(t, axis, True).index_select(0, back) for t in (q, k, v))
    part = slice(rank * heads // size, (rank + 1) * heads // size)
    local = replace(
        spec,
        num_heads=heads // size,
        num_kv_heads=max(1, kv_heads // size),
        head_offset=spec.head_offset + part.start,
        alibi_slopes=None if spec.alibi_slopes is None else spec.alibi_slopes[part],
    )
    out = attend(q, k, v, local, None if sinks is None else sinks[part])
    return _Exchange.apply(out.index_select(0, order), axis, False)


class _Exchange(torch.autograd.Function):
    """All-to-all from `[local tokens, heads, dim]` to `[all tokens in rank order, heads / n, dim]`, or back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: ParallelAxis, to_tokens: bool) -> torch.Tensor:
        ctx.axis, ctx.to_tokens = axis, to_tokens
        return _exchanged(x, axis, to_tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _exchanged(gradients[0], ctx.axis, not ctx.to_tokens), None, None


def _exchanged(x: torch.Tensor, axis: ParallelAxis, to_tokens: bool) -> torch.Tensor:
    exchange: Any = axis.collectives
    if to_tokens:
        return exchange.all_to_all(x.unflatten(1, (axis.size, -1)).transpose(0, 1)).flatten(0, 1)
    return exchange.all_to_all(x.unflatten(0, (axis.size, -1))).transpose(0, 1).flatten(1, 2)
