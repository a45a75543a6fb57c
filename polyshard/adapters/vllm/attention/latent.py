"""Latent attention inside a vLLM worker: vLLM's own layer over a cache of latents, where the model's config has it."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import (
    MLAAttention,
    UnquantizedLinearMethod,
    VllmConfig,
    latents_lack,
    model_dtype,
    uses_latents,
)
from polyshard.core.attention import AttentionSpec, LatentFactory, LatentSpec
from polyshard.core.errors import RegistrationError


class _Expansion:
    """The layer from latents to keys and values as vLLM's layer asks for it: a call gives a pair, as its own do.

    Not a module, so that the layer's parameters are the model's once.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        owners: list[Any] = [m for m in layer.modules() if isinstance(m._parameters.get("weight"), nn.Parameter)]
        (owner,) = owners
        self._layer, self._owner, self.params_dtype = layer, owner, dtype
        # vLLM's layers throw away what they have packed on CPU, and here it is read again.
        owner._cpu_skip_gemm_dispatch = True

    @property
    def weight(self) -> torch.Tensor:
        """`[heads * (nope_dim + value_dim), kv_rank]`."""
        return self._owner.weight

    @property
    def quant_method(self) -> Any:
        """vLLM's for a quantized layer; None for a weight that is read as it is, whatever multiplies by it."""
        method = getattr(self._owner, "quant_method", None)
        quantized = getattr(method, "quant_config", None) is not None and not isinstance(
            method, UnquantizedLinearMethod
        )
        return method if quantized else None

    def __call__(self, latent: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self._layer(latent), None


class CachedLatents(nn.Module):
    """`LatentCore` by vLLM's MLA layer, which finds batch and cache in vLLM's forward context."""

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
        """`[tokens, heads, value_dim]`."""
        heads, value = self.sizes
        out = self.attention(q, latent, k_rope, output_shape=(len(q), heads * value))
        return out.unflatten(-1, (heads, value))


def latent_factory(vllm_config: VllmConfig, exact: bool = False) -> LatentFactory | None:
    """Makes the latent cores of one model; None where vLLM caches no latents for its config.

    `exact`: there are none. Expanding one token and many gives other bits, so exact mode caches what was expanded.
    """
    if not uses_latents(vllm_config):
        return None
    next_index, model_type = count(), getattr(vllm_config.model_config.hf_text_config, "model_type", None)

    def create(spec: AttentionSpec, latent: LatentSpec, expand: nn.Module) -> CachedLatents:
        index = next(next_index) if spec.layer_index is None else spec.layer_index
        size = latent.kv_rank + latent.rope_dim
        lack = "exact mode has none" if exact else latents_lack(vllm_config, size, spec.num_heads)
        if lack is not None:
            raise RegistrationError(
                f"vLLM lays out its cache for latents, as the config's model_type is {model_type!r}, but for latents "
                f"and rotated keys of {size} together {lack}: set VLLM_MLA_DISABLE=1, and keys and values are cached "
                "written out, head by head"
            )
        return CachedLatents(spec, latent, expand, vllm_config, f"model.layers.{index}.self_attn.attn")

    return create
