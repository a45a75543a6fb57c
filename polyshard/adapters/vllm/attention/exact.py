"""Attention of exact mode on CPU: a token's bits are the same in an engine and a trainer, in any batch.

It runs polyshard's native kernel over vLLM's pages. Layers that the native kernel does not support run vLLM's kernel,
in chunks of queries that are the same in every batch. POLYSHARD_ATTENTION=vllm selects vLLM's kernel for all layers.
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
    """`NativeImpl` that runs the native kernel for every batch."""

    always = True


class AlwaysNativeBackend(NativeBackend):
    """vLLM's CPU attention backend with `AlwaysNativeImpl`, for `Attention(attn_backend=...)`."""

    @staticmethod
    @override
    def get_impl_cls() -> type[NativeImpl]:
        return AlwaysNativeImpl


def exact_backend_for(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> Any:
    """Return the attention backend of an engine in exact mode; see `supports` for the arguments."""
    return AlwaysNativeBackend if _uses_native_kernel(spec, head_dim, dtype) else compat.BatchInvariantBackend


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the attention of a trainer in exact mode, over pages that exist only during the call.

    Args:
        q: `[tokens, heads, dim]`, with a `dim` that vLLM's cache supports.
        k: `[keys, kv_heads, dim]`.
        v: the same shape as `k`.
        call: the attention call; each sequence must have at least as many keys as queries.

    Returns:
        The output `[tokens, heads, dim]`, and the logsumexp `[tokens, heads]` if it is requested and the kernel
        computes it, else None.
    """
    size = q.shape[2]
    if not _uses_native_kernel(call.spec, size, q.dtype):
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


def attention_kernel_name(dtype: torch.dtype) -> str:
    """Return the kernel of attention with heads of size 64 on this machine: `native` or `vllm`."""
    usual = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64, scale=1.0)
    return "native" if _uses_native_kernel(usual, usual.head_dim, dtype) else "vllm"


def _uses_native_kernel(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> bool:
    isa = compat.cpu_isa(dtype, head_dim)
    return supports(spec, head_dim, dtype) and compat.keeps_keys_transposed(isa, dtype, CPU_BLOCK, head_dim)
