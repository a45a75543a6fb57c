"""The attention core inside a vLLM worker: its attention layer over the paged KV cache."""

from __future__ import annotations

from itertools import count

import torch
from torch import nn

from polyshard.adapters.vllm.compat import Attention, VllmConfig
from polyshard.core.attention import AttentionFactory, AttentionSpec, PackedSequences
from polyshard.core.errors import RegistrationError


class PagedAttention(nn.Module):
    """`AttentionCore` by vLLM's attention layer, which finds batch and cache in vLLM's forward context."""

    def __init__(self, spec: AttentionSpec, vllm_config: VllmConfig, layer_name: str) -> None:
        super().__init__()
        if not spec.causal:
            raise RegistrationError("vLLM serves causal decoders: an attention with causal=False cannot be served")
        self.attention = Attention(
            spec.num_heads,
            spec.head_dim,
            spec.scale,
            num_kv_heads=spec.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=spec.sliding_window,
            prefix=layer_name,
        )
        backend = self.attention.attn_backend
        sizes = getattr(backend, "get_supported_head_sizes", list)()
        if sizes and spec.head_dim not in sizes:
            raise RegistrationError(
                f"head dimension {spec.head_dim} is not supported by vLLM's attention backend {backend.get_name()}, "
                f"which has {sorted(sizes)}"
            )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        """`[tokens, heads, head_dim]`; `sequences` is vLLM's affair."""
        out = self.attention(q.flatten(-2), k.flatten(-2), v.flatten(-2))
        return out.view(q.shape)


def paged_attention_factory(vllm_config: VllmConfig) -> AttentionFactory:
    """Makes the attention cores of one model; a layer without an index takes the next one, for a name of its own."""
    next_index = count()

    def create(spec: AttentionSpec) -> PagedAttention:
        index = next(next_index) if spec.layer_index is None else spec.layer_index
        return PagedAttention(spec, vllm_config, f"model.layers.{index}.self_attn.attn")

    return create
