"""Attention of an engine on CPU by polyshard's compiled loops, over the pages of vLLM's own cache.

vLLM writes keys and values there as ever, and owns prefixes, chunks and what is evicted. The kernel that reads them is
what is exchanged.
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
    has_product_of_processor,
    keeps_keys_transposed,
)
from polyshard.attention.kernels.cpu import native_paged as paged
from polyshard.core.attention import AttentionSpec
from polyshard.core.environment import ATTENTION


def pages_of(kv_cache: torch.Tensor, isa: str, spec: AttentionSpec) -> paged.Pages | None:
    """A layer's cache `[pages, kv_heads, tokens, 2 dim]` as the loops read it; None where it has another form."""
    count, kv_heads, size, twice = kv_cache.shape
    if not keeps_keys_transposed(isa, kv_cache.dtype, size, twice // 2):
        return None
    keys, values = kv_cache.view(count, kv_heads, 2, -1).unbind(2)
    return paged.Pages(keys.unflatten(-1, (-1, size)), values.unflatten(-1, (size, -1)), spec)


class CompiledMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's, which also hands on what the loops ask of a step."""

    @override
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        found: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        tensors = (found.query_start_loc, found.seq_lens, found.block_table)
        found.requests = paged.Requests(*(t.to(torch.int32) for t in tensors))
        return found


class NativeImpl(CPUAttentionBackendImpl):
    """vLLM's, whose kernel attends where the loops would leave threads idle, unless a batch must not change the kernel.

    Attributes:
        always: whether the loops take every batch.
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
        self._known: tuple[Callable[[], torch.Tensor | None], paged.Pages | None] = (lambda: None), None

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
        """`output` `[tokens, heads, head_size]`, which is filled; `kv_cache` as the class above has it."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is not None and scales == (None, None) and attn_metadata.causal is True:
            requests: paged.Requests = attn_metadata.requests
            pages, tokens = self._pages_of(layer.isa, kv_cache), attn_metadata.num_actual_tokens
            if pages is not None and (self.always or paged.is_faster(requests, tokens, self._spec)):
                paged.attend(query[:tokens], pages, requests, output[:tokens], self.sinks)
                return output
        assert attn_metadata is None or not self.always, "a batch that the loops do not take"
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)

    def _pages_of(self, isa: str, kv_cache: torch.Tensor) -> paged.Pages | None:
        """`pages_of` it, known since the last call."""
        known, pages = self._known
        if known() is not kv_cache:
            pages = pages_of(kv_cache, isa, self._spec)
            self._known = weakref.ref(kv_cache), pages
        return pages


class NativeBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with both, for `Attention(attn_backend=...)`."""

    @staticmethod
    @override
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return NativeImpl

    @staticmethod
    @override
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CompiledMetadataBuilder


def supports(spec: AttentionSpec, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the loops have all that a layer asks for and are the fastest on this processor.

    The environment variable POLYSHARD_ATTENTION=vllm, by which a trainer attends by vLLM's kernel, means that kernel
    here too.

    Args:
        spec: of the layer.
        head_dim: of a head in the cache, of keys and of values.
        dtype: of the model and of the cache.
    """
    if ATTENTION.read() == "vllm" or has_product_of_processor(dtype):
        return False
    plain = replace(spec, head_dim=head_dim, value_dim=head_dim, dropout=0.0)  # which an engine never applies
    return paged.unsupported_reason(plain) is None


def backend_for(spec: AttentionSpec, head_dim: int, dtype: torch.dtype, cache_dtype: str) -> Any:
    """`NativeBackend` for a layer that the loops take; None for vLLM's own.

    Args:
        spec: see `takes`.
        head_dim: likewise.
        dtype: of the model.
        cache_dtype: vLLM's name of the cache's; a narrower one rounds keys and values that the loops would not.
    """
    return NativeBackend if cache_dtype == "auto" and supports(spec, head_dim, dtype) else None
