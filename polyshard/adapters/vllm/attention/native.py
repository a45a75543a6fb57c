"""Attention of an engine on CPU with polyshard's native kernel, over the pages of vLLM's KV cache.

Only the kernel that reads keys and values is replaced. vLLM still writes them, and manages prefixes, chunks and
eviction.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from polyshard.adapters.vllm.compat import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    has_vllm_only_instructions,
    keeps_keys_transposed,
)
from polyshard.attention.kernels.cpu import native_paged as paged
from polyshard.core.attention import AttentionSpec
from polyshard.core.environment import ATTENTION


def pages_of(kv_cache: torch.Tensor, isa: str, spec: AttentionSpec) -> paged.Pages | None:
    """Return views of a layer's cache `[pages, kv_heads, tokens, 2 * dim]` for the native kernel.

    None if vLLM stores keys and values in another layout for this instruction set.
    """
    count, kv_heads, size, twice = kv_cache.shape
    if not keeps_keys_transposed(isa, kv_cache.dtype, size, twice // 2):
        return None
    keys, values = kv_cache.view(count, kv_heads, 2, -1).unbind(2)
    return paged.Pages(keys.unflatten(-1, (-1, size)), values.unflatten(-1, (size, -1)), spec)


class NativeMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's metadata builder, which also attaches the batch description of the native kernel (`requests`)."""

    @override
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        tensors = (metadata.query_start_loc, metadata.seq_lens, metadata.block_table)
        metadata.requests = paged.Requests(*(t.to(torch.int32) for t in tensors))
        return metadata


class NativeImpl(CPUAttentionBackendImpl):
    """vLLM's implementation with the native kernel substituted when that is faster, or always if `always` is set.

    vLLM's kernel is kept for batches too small to occupy all threads of the native one.

    Attributes:
        always: whether the native kernel runs every batch, so that a batch never changes the kernel.
    """

    always = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._spec = AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            scale=self.scale,
            sliding_window=None if self.sliding_window < 0 else self.sliding_window,
            softcap=self.logits_soft_cap or None,
            alibi_slopes=None if self.alibi_slopes is None else tuple(map(float, self.alibi_slopes)),
        )
        self._cached: tuple[Callable[[], torch.Tensor | None], paged.Pages | None] = (lambda: None), None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the attention output `[tokens, heads, head_size]` to `output`, and return it."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is not None and scales == (None, None) and attn_metadata.causal is True:
            requests: paged.Requests = attn_metadata.requests
            pages, tokens = self._pages_of(layer.isa, kv_cache), attn_metadata.num_actual_tokens
            if pages is not None and (self.always or paged.is_faster(requests, tokens, self._spec)):
                paged.attend(query[:tokens], pages, requests, output[:tokens], self.sinks)
                return output
        assert attn_metadata is None or not self.always, "the native kernel does not support this batch"
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)

    def _pages_of(self, isa: str, kv_cache: torch.Tensor) -> paged.Pages | None:
        """Return `pages_of` the cache; the result is kept until another cache is passed."""
        cached, pages = self._cached
        if cached() is not kv_cache:
            pages = pages_of(kv_cache, isa, self._spec)
            self._cached = weakref.ref(kv_cache), pages
        return pages


class NativeBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with the native kernel, for `Attention(attn_backend=...)`."""

    @staticmethod
    @override
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return NativeImpl

    @staticmethod
    @override
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return NativeMetadataBuilder


def supports(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the native kernel supports a layer and is the fastest on this processor.

    The environment variable POLYSHARD_ATTENTION=vllm selects vLLM's kernel, in a trainer and in an engine.

    Args:
        spec: the layer's attention spec.
        head_dim: head dimension of keys and values in the cache.
        dtype: dtype of the model and of the cache.
    """
    if ATTENTION.read() == "vllm" or has_vllm_only_instructions(dtype):
        return False
    plain = replace(spec, head_dim=head_dim, value_dim=head_dim, dropout=0.0)  # an engine never applies dropout
    return paged.unsupported_reason(plain) is None


def backend_for(spec: AttentionSpec, head_dim: int, dtype: torch.dtype, cache_dtype: str) -> Any:
    """Return `NativeBackend` for a layer that the native kernel supports; None for vLLM's default backend.

    Args:
        spec: the layer's attention spec.
        head_dim: head dimension of keys and values in the cache.
        dtype: dtype of the model.
        cache_dtype: vLLM's name of the cache dtype; vLLM's kernel serves all but `auto`.
    """
    return NativeBackend if cache_dtype == "auto" and supports(spec, head_dim, dtype) else None
