"""Attention of exact mode on CPU: a token's bits are the same in an engine and a trainer, whatever stands beside it.

By polyshard's compiled loops, over vLLM's pages. What they do not take is attended by vLLM's kernel, in pieces of
queries that are cut alike in every batch; all is where POLYSHARD_ATTENTION=vllm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.attention.native import NativeBackend, NativeImpl, pages_of, supports
from polyshard.adapters.vllm.compat.paging import CPU_BLOCK
from polyshard.attention.kernels.cpu import native_paged as paged
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec


class AlwaysNativeImpl(NativeImpl):
    """The loops for every batch."""

    always = True


class AlwaysNativeBackend(NativeBackend):
    """vLLM's CPU attention backend with it, for `Attention(attn_backend=...)`."""

    @staticmethod
    @override
    def get_impl_cls() -> type[NativeImpl]:
        return AlwaysNativeImpl


def exact_backend_for(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> Any:
    """What an engine attends by; arguments as of `takes`."""
    return AlwaysNativeBackend if _by_loops(spec, head_dim, dtype) else compat.PinnedBackend


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a trainer attends by: the same, over pages that last for the call.

    Args:
        q: `[tokens, heads, dim]`, of a size that vLLM's cache has.
        k: `[keys, kv_heads, dim]`.
        v: the same shape.
        call: each of its sequences has as many keys as queries, or more.

    Returns:
        `[tokens, heads, dim]`, and the logsumexp `[tokens, heads]` where it is wanted and comes with it.
    """
    size = q.shape[2]
    if not _by_loops(call.spec, size, q.dtype):
        return compat.cpu_attention(q, k, v, call, exact=True), None
    cache, blocks, isa = compat.cpu_cache(k, v, call.keys.host)
    slopes = None if call.alibi_slopes is None else tuple(call.alibi_slopes.tolist())
    spec = replace(call.spec, head_dim=size, value_dim=size, alibi_slopes=slopes)
    pages = pages_of(cache.view(blocks.count, k.shape[1], CPU_BLOCK, 2 * size), isa, spec)
    assert pages is not None
    requests = paged.Requests(*(t.to(torch.int32) for t in (call.queries.host, call.keys.host.diff(), blocks.table)))
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:2]) if call.logsumexp else None
    paged.attend(q if q.stride(-1) == 1 else q.contiguous(), pages, requests, out, call.sinks, logsumexp)
    return out, logsumexp


def whose_kernel(dtype: torch.dtype) -> str:
    """What attends heads of a usual size here: "compiled" or "vllm"."""
    usual = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64, scale=1.0)
    return "compiled" if _by_loops(usual, usual.head_dim, dtype) else "vllm"


def _by_loops(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> bool:
    isa = compat.cpu_isa(dtype, head_dim)
    return supports(spec, head_dim, dtype) and compat.keeps_keys_transposed(isa, dtype, CPU_BLOCK, head_dim)
