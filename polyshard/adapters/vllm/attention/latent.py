"""Latent attention inside a vLLM worker: vLLM's MLA layer, if vLLM caches latents for the model's config."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import (
    MLAAttention,
    UnquantizedLinearMethod,
    VllmConfig,
    latent_unsupported_reason,
    model_dtype,
    uses_latent_cache,
)
from polyshard.core.attention import AttentionSpec, LatentFactory, LatentSpec
from polyshard.core.errors import RegistrationError


class _Expansion:
    """The layer from latents to keys and values, with the interface of a vLLM layer: a call returns a pair.

    It is not a module, so that the layer's parameters are registered in the model only once.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        owners: list[Any] = [m for m in layer.modules() if isinstance(m._parameters.get("weight"), nn.Parameter)]
        (owner,) = owners
        self._layer, self._owner, self.params_dtype = layer, owner, dtype
        # On CPU vLLM's layers free a weight once it is packed, but this weight is read again.
        owner._cpu_skip_gemm_dispatch = True

    @property
    def weight(self) -> torch.Tensor:
        """`[heads * (nope_dim + value_dim), kv_rank]`."""
        return self._owner.weight

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        """Keep the weight, which vLLM frees once AMX's backend has packed it: a reload or a sync writes it again."""
        assert not value.numel(), value.shape

    @property
    def quant_method(self) -> Any:
        """vLLM's quantization method of a quantized layer; None for floating-point weights."""
        method = getattr(self._owner, "quant_method", None)
        quantized = getattr(method, "quant_config", None) is not None and not isinstance(
            method, UnquantizedLinearMethod
        )
        return method if quantized else None

    def __call__(self, latent: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._layer(latent), None


class CachedLatents(nn.Module):
    """`LatentCore` on vLLM's MLA layer, which reads batch and cache from vLLM's forward context."""

    def __init__(
        self, spec: AttentionSpec, latent: LatentSpec, expand: nn.Module, vllm_config: VllmConfig, layer_name: str
    ) -> None:
        super().__init__()
        self.sizes = (spec.num_heads, spec.v_dim)
        expansion: Any = _Expansion(expand, model_dtype(vllm_config))
        self.attention = MLAAttention(
            num_heads=spec.num_heads,
            scale=spec.scale,
            qk_nope_head_dim=latent.nope_dim,
            qk_rope_head_dim=latent.rope_dim,
            v_head_dim=spec.v_dim,
            q_lora_rank=latent.q_rank,
            kv_lora_rank=latent.kv_rank,
            kv_b_proj=expansion,
            cache_config=vllm_config.cache_config,
            prefix=layer_name,
        )

    def forward(self, q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """Return the attention output `[tokens, heads, value_dim]`."""
        heads, value = self.sizes
        out = self.attention(q, latent, k_rope, output_shape=(len(q), heads * value))
        return out.unflatten(-1, (heads, value))


def latent_factory(vllm_config: VllmConfig, exact: bool = False) -> LatentFactory | None:
    """Return a factory of latent attention cores for one model; None if vLLM does not cache latents for its config.

    Args:
        vllm_config: vLLM's configuration of the model.
        exact: exact mode, in which the factory always raises. Expanding one token or many gives different bits, so
            exact mode caches the expanded keys and values.
    """
    if not uses_latent_cache(vllm_config):
        return None
    next_index, model_type = count(), getattr(vllm_config.model_config.hf_text_config, "model_type", None)

    def create(spec: AttentionSpec, latent: LatentSpec, expand: nn.Module) -> CachedLatents:
        index = next(next_index) if spec.layer_index is None else spec.layer_index
        size = latent.kv_rank + latent.rope_dim
        reason = "unsupported in exact mode"
        if not exact:
            reason = latent_unsupported_reason(vllm_config, spec, latent)
        if reason is not None:
            raise RegistrationError(
                f"vLLM caches latents for model_type {model_type!r}, but cannot serve latents and rotated keys of "
                f"{size}: {reason}. VLLM_MLA_DISABLE=1 caches the expanded keys and values of every head instead"
            )
        return CachedLatents(spec, latent, expand, vllm_config, f"model.layers.{index}.self_attn.attn")

    return create
