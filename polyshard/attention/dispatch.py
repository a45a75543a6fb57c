"""Dispatch of a module's attention: to a server's core, to a kernel on this rank, or over the context axis."""

from __future__ import annotations

import math

import torch

from polyshard.attention.context_parallel.parallel import Way, context_parallel_attention
from polyshard.attention.kernel_call import run_kernel
from polyshard.core.attention import AttentionCore, AttentionSpec, PackedSequences
from polyshard.core.context import ParallelContext
from polyshard.core.exact_identity import exact_kernel


def dispatch_attention(
    core: AttentionCore | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: PackedSequences | None,
    spec: AttentionSpec,
    parallel_context: ParallelContext,
    way: Way,
    *,
    training: bool,
    sinks: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """Compute attention with a server's core if there is one, else with a kernel on this rank or over the context axis.

    Args:
        core: the server's attention core, which knows the sequences; None in training.
        q: `[tokens, heads, head_dim]` or `[batch, seq, heads, head_dim]`.
        k: the same with KV heads.
        v: the same with KV heads and `value_dim`.
        sequences: boundaries of the tokens of all context-parallel ranks; may be None only with a core.
        spec: the request, for the heads of `q` and `k`.
        parallel_context: the context with the context axis.
        way: see `context_parallel_attention`.
        training: whether dropout applies.
        sinks: `[heads]`; None without sinks.
        kernel: name of the kernel to use; default: the fastest one.

    Returns:
        `[tokens, heads * value_dim]` or `[batch, seq, heads * value_dim]`.
    """
    lead = q.shape[:-2]
    q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    if core is not None:
        return _shaped(core(q, k, v, sequences), lead)
    assert sequences is not None
    if parallel_context.axis("context").size == 1:
        kernel = exact_kernel(parallel_context, kernel)
        out = run_kernel(q, k, v, sequences, spec, training, kernel, sinks=sinks)
    else:
        rows = 1 if len(lead) == 1 else max(1, lead[0])  # a batch may have none
        out = context_parallel_attention(
            q, k, v, sequences, spec, parallel_context, way, training=training, rows=rows, sinks=sinks, kernel=kernel
        )
    return _shaped(out, lead)


def _shaped(out: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """Return `[tokens, ...]` as `[*lead, channels]`; -1 would be ambiguous without tokens."""
    return out.reshape(*lead, math.prod(out.shape[1:]))
