"""Megatron-Core's latent attention without Transformer Engine, which Megatron-Core 0.16 requires for it."""

from __future__ import annotations

from typing import Any


def with_local_attention(block: Any) -> Any:
    """Let a decoder's latent attention use `DotProductAttention`, and return the decoder's specification.

    `MLASelfAttention` passes the head sizes of keys and values. Only `TEDotProductAttention` accepts them.
    `DotProductAttention` assumes that both are `kv_channels`, and uses that size only for the shape of its output.

    Args:
        block: Megatron's `TransformerBlockSubmodules`.
    """
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    module: Any = multi_latent_attention
    if not isinstance(module.TELinear, type):
        module.TELinear = type("TELinear", (), {})  # MLASelfAttention asks whether a layer is an instance of it

    class LatentDotProductAttention(DotProductAttention):
        """`DotProductAttention` for values whose head size differs from that of the keys."""

        def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if v_channels:  # the base class of MLASelfAttention first builds one without sizes, which is then replaced
                self.hidden_size_per_attention_head = k_channels
                self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels

    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = LatentDotProductAttention
    return block
