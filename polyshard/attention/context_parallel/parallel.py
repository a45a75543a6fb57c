"""Attention over the context axis, with Ulysses or ring attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch

from polyshard.attention.context_parallel.ring import ring_attention
from polyshard.attention.context_parallel.ulysses import heads_divide, ulysses_attention
from polyshard.attention.kernel_call import call_of, run_kernel
from polyshard.attention.kernels.cpu.kernels import Chunked
from polyshard.attention.kernels.protocol import BlockKernel
from polyshard.attention.packing import pack
from polyshard.attention.selection import select_kernel
from polyshard.core.attention import AttentionSpec, PackedSequences
from polyshard.core.context import ParallelAxis, ParallelContext
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
    """Compute the attention of this rank's tokens over the tokens of all ranks of the context axis. Differentiable.

    Args:
        q: `[local tokens, heads, head_dim]`: this rank's part, as returned by `context_shard`.
        k: `[local tokens, kv_heads, head_dim]`.
        v: `[local tokens, kv_heads, value_dim]`.
        sequences: boundaries of the tokens of all ranks.
        spec: the request, for the heads of `q` and `k`.
        parallel_context: the context with the context axis, which may have one rank.
        way: `"ulysses"` exchanges heads for tokens and gives the same bits as a single process; `"ring"` passes keys
            and values around the ranks, works with any number of heads, and agrees with a single process within
            rounding; `"auto"` selects Ulysses if the heads can be divided over the ranks, else ring. Exact mode always
            uses Ulysses.
        training: whether dropout applies.
        rows: number of rows of the batch, each sharded in the same way; 1 for packed tokens.
        sinks: `[heads]`; None without sinks.
        kernel: name of the kernel to use; default: the fastest one.

    Returns:
        `[local tokens, heads, value_dim]`.

    Raises:
        ConfigurationError: heads or tokens cannot be divided over the ranks, or the kernel cannot run in a ring.

    Examples:
        On one rank, which holds all tokens:

        >>> from polyshard.core import AttentionSpec
        >>> q, k, v = torch.randn(6, 4, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)
        >>> spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
        >>> sequences = ps.pack(torch.tensor([0, 6]), tokens=6)
        >>> context_parallel_attention(q, k, v, sequences, spec, ps.initialize("torch")).shape
        torch.Size([6, 4, 16])
    """
    axis = parallel_context.axis("context")
    exact = parallel_context.exact
    if exact is not None:
        kernel, way = exact_kernel(parallel_context, kernel), "ulysses"  # a ring sums in a different order
    if axis.size == 1:
        return run_kernel(q, k, v, sequences, spec, training, kernel, sinks=sinks)
    expected = q.shape[0] * axis.size
    if torch.compiler.is_compiling():  # the check is an operator there
        sequences = replace(sequences, host=pack(sequences.host, expected).host)
    elif (tokens := int(sequences.host[-1])) != expected:
        raise ConfigurationError(
            f"The boundaries do not match the tokens: got {tokens} tokens in the sequences, expected "
            f"{expected} ({q.shape[0]} on each of {axis.size} ranks). Pass the boundaries of the tokens "
            "of all ranks."
        )
    if way not in get_args(Way):
        raise ConfigurationError(f"way is invalid: got {way!r}, expected one of {', '.join(get_args(Way))}.")
    if way == "ulysses" or (way == "auto" and heads_divide(spec, axis.size)):

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: AttentionSpec, sinks: torch.Tensor | None
        ) -> torch.Tensor:
            return run_kernel(q, k, v, sequences, part, training, kernel, sinks=sinks)

        return ulysses_attention(q, k, v, spec, sinks, axis, rows, attend)
    return _ring(q, k, v, sequences, spec, sinks, axis, rows, training, kernel)


@torch.compiler.disable(reason="ring attention exchanges keys and values in Python")
def _ring(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: PackedSequences,
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    axis: ParallelAxis,
    rows: int,
    training: bool,
    kernel: str | None,
) -> torch.Tensor:
    if not training and spec.dropout:
        spec = replace(spec, dropout=0.0)
    call = call_of(q, sequences, spec)
    return ring_attention(q, k, v, call, sinks, axis, rows, _ring_kernel(spec, q, training, kernel))


def _ring_kernel(spec: AttentionSpec, q: torch.Tensor, training: bool, name: str | None) -> BlockKernel:
    """Return the selected kernel if it can run in a ring, else the chunked kernel.

    A ring needs a `BlockKernel`, and one that accepts positions if the mask depends on them.
    """
    chosen = select_kernel(spec, q.device, q.dtype, training, name)
    if not isinstance(chosen, BlockKernel) or chosen.native_sinks:
        if name is not None:
            raise ConfigurationError(
                f"Attention kernel {name!r} does not support ring attention: it returns no logsumexp for a part of the "
                "keys. Select another kernel, or context_parallel='ulysses'."
            )
        return Chunked()
    positions = spec.sliding_window is not None or spec.alibi_slopes is not None or spec.dropout > 0
    return Chunked() if positions else chosen
