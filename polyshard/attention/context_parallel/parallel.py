"""Attention over the context axis, by the way that is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from polyshard.attention.context_parallel.ring import ring_attention
from polyshard.attention.context_parallel.ulysses import heads_divide, ulysses_attention
from polyshard.attention.kernel_call import call_of, run_kernel
from polyshard.attention.kernels.cpu.kernels import Chunked
from polyshard.attention.kernels.protocol import BlockKernel
from polyshard.attention.selection import select_kernel
from polyshard.core.attention import AttentionSpec, PackedSequences
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.exact_identity import exact_kernel

Way = Literal["auto", "ulysses", "ring"]


def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: PackedSequences,
    spec: AttentionSpec,
    parallel_context: ParallelContext,
    way: Way = "auto",
    *,
    training: bool = True,
    rows: int = 1,
    sinks: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Attention of this rank's tokens to the tokens of all ranks of the context axis (maybe one); differentiable.

    Args:
        q: `[local tokens, heads, head_dim]`: this rank's part, as `context_shard` cuts it.
        k: `[local tokens, kv_heads, head_dim]`.
        v: `[local tokens, kv_heads, value_dim]`.
        sequences: boundaries of all tokens, those of other ranks included.
        spec: the request, for the heads given.
        parallel_context: whose context axis it is.
        way: `"ulysses"` exchanges heads for tokens, and gives the bits of one process; `"ring"` sends keys round, has
            no condition on heads, and gives them within rounding; `"auto"` takes the first where heads divide.
        training: whether dropout applies.
        rows: rows of the batch, each cut alike; 1 for packed tokens.
        sinks: `[heads]`.
        kernel: force one by name.

    Raises:
        ConfigurationError: heads or tokens do not divide over the ranks; the kernel cannot run in a ring.
    """
    axis = parallel_context.axis("context")
    exact = parallel_context.exact
    if exact is not None:
        kernel, way = exact_kernel(parallel_context, kernel), "ulysses"  # a ring adds parts in another order
    if axis.size == 1:
        return run_kernel(q, k, v, sequences, spec, training, kernel, sinks=sinks)
    held = int(sequences.host[-1])
    if held != q.shape[0] * axis.size:
        raise ConfigurationError(
            f"the sequences hold {held} tokens, but {axis.size} ranks with {q.shape[0]} each hold "
            f"{q.shape[0] * axis.size}: boundaries are those of all ranks' tokens"
        )
    if way not in get_args(Way):
        raise ConfigurationError(f"context parallel must be one of {get_args(Way)}, got {way!r}")
    if way == "ulysses" or (way == "auto" and heads_divide(spec, axis.size)):

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: AttentionSpec, sinks: torch.Tensor | None
        ) -> torch.Tensor:
            return run_kernel(q, k, v, sequences, part, training, kernel, sinks=sinks)

        return ulysses_attention(q, k, v, spec, sinks, axis, rows, attend)
    if not training and spec.dropout:
        spec = replace(spec, dropout=0.0)
    call = call_of(q, sequences, spec)
    return ring_attention(q, k, v, call, sinks, axis, rows, _ring_kernel(spec, q, training, kernel))


def _ring_kernel(spec: AttentionSpec, q: torch.Tensor, training: bool, name: str | None) -> BlockKernel:
    """The chosen kernel where it has two halves and the mask needs no positions; else the one that takes them."""
    chosen = select_kernel(spec, q.device, q.dtype, training, name)
    if not isinstance(chosen, BlockKernel) or chosen.native_sinks:
        if name is not None:
            raise ConfigurationError(f"attention kernel {name!r} gives no logsumexp for parts: it cannot run in a ring")
        return Chunked()
    positions = spec.sliding_window is not None or spec.alibi_slopes is not None or spec.dropout > 0
    return Chunked() if positions else chosen
