"""Megatron-Core's latent attention without Transformer Engine, whose attention it needs (0.16)."""

from __future__ import annotations

from typing import Any


def with_local_attention(block: Any) -> Any:
    """Return the specification of a decoder whose latent attention computes by `DotProductAttention`.

    `MLASelfAttention` passes the widths of keys and values, which only `TEDotProductAttention` accepts. The local class
    takes both for `kv_channels`, which it uses for the shape of its output alone.

    Args:
        block: Megatron's `TransformerBlockSubmodules`.
    """
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    module: Any = multi_latent_attention
    if not isinstance(module.TELinear, type):
        module.TELinear = type("TELinear", (), {})  # MLASelfAttention asks whether a layer is an instance of it

    class LatentDotProductAttention(DotProductAttention):
        """Megatron's attention with values of their own width."""

        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if v_channels:  # the base class of MLASelfAttention builds one that is replaced, without them
                self.hidden_size_per_attention_head = k_channels
                self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels

    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = LatentDotProductAttention
    return block
