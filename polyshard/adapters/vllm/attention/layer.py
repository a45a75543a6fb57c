"""The attention core inside a vLLM worker: its attention layer over the paged KV cache."""

from __future__ import annotations

import logging
from itertools import count
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.attention.exact import exact_backend_for
from polyshard.adapters.vllm.attention.native import backend_for
from polyshard.adapters.vllm.compat import (
    Attention,
    VllmConfig,
    cpu_head_size,
    model_dtype,
    rotate_in_place,
    takes_rotary,
)
from polyshard.adapters.vllm.compat.paging import filled
from polyshard.attention.rotary import rotate_heads
from polyshard.core.attention import AttentionFactory, AttentionSpec, PackedSequences
from polyshard.core.errors import RegistrationError

logger = logging.getLogger(__name__)


class RotaryTable:
    """Cosines and sines in the form of vLLM's operator, made by a forward's first layer for all that share them."""

    def __init__(self) -> None:
        self._cos: torch.Tensor | None = None
        self._maker: object = None
        self._table = self._rows = torch.empty(0)

    def of(self, maker: object, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The table `[tokens, rotary_dim]`, and each token's row. A layer that asks again begins a new forward."""
        if self._cos is not cos or self._maker is maker:
            self._cos, self._maker = cos, maker
            self._table = torch.cat((cos, sin), dim=-1).flatten(0, -2)
            # On a GPU made anew: a captured graph would go on reading rows that the next size has replaced.
            if cos.device.type != "cpu" or len(self._rows) != len(self._table):
                self._rows = torch.arange(len(self._table), device=cos.device)
        return self._table, self._rows


class PagedAttention(nn.Module):
    """`AttentionCore` by vLLM's attention layer, which finds batch and cache in vLLM's forward context.

    Its cache holds keys and values of one size, on CPU one of some few: what is smaller is filled up with zeros, which
    changes no score and no output.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        vllm_config: VllmConfig,
        layer_name: str,
        sinks: torch.Tensor | None,
        rotary: RotaryTable,
        exact: bool,
    ) -> None:
        super().__init__()
        self._rotary = rotary
        if not spec.causal:
            raise RegistrationError("vLLM serves causal decoders: an attention with causal=False cannot be served")
        self.spec = spec
        needed = max(spec.head_dim, spec.v_dim)
        on_cpu = vllm_config.device_config.device_type == "cpu"
        self.head_dim = (cpu_head_size(needed) if on_cpu else None) or needed
        if self.head_dim != needed and spec.layer_index in (None, 0):
            logger.info("heads of %d are held as %d in the cache: vLLM has no kernel between", needed, self.head_dim)
        features = _features(spec, sinks)
        backend, layer = None, (spec, self.head_dim, model_dtype(vllm_config))
        if on_cpu and exact:
            backend = exact_backend_for(*layer)
        elif on_cpu:
            backend = backend_for(*layer, vllm_config.cache_config.cache_dtype)
        try:
            self.attention = Attention(
                spec.num_heads,
                self.head_dim,
                spec.scale,
                num_kv_heads=spec.num_kv_heads,
                cache_config=vllm_config.cache_config,
                quant_config=None,  # else it has scales of the cache as parameters, which few checkpoints hold
                per_layer_sliding_window=spec.sliding_window,
                prefix=layer_name,
                attn_backend=backend,
                **features,
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            asked = ", ".join(["sliding_window"] * (spec.sliding_window is not None) + sorted(features)) or "nothing"
            raise RegistrationError(
                f"vLLM has no attention for {layer_name}, which asks for {asked}: {error}"
            ) from error
        if self.attention.sliding_window != spec.sliding_window:
            # vLLM falls back on the config's window where a layer names none.
            raise RegistrationError(
                f"{layer_name} asks for sliding_window={spec.sliding_window}, but vLLM reads "
                f"{self.attention.sliding_window} from the model's config: make both say the same "
                "(hf_overrides={'sliding_window': None} for a model without one)"
            )
        backend = self.attention.attn_backend
        sizes = getattr(backend, "get_supported_head_sizes", list)()
        if sizes and self.head_dim not in sizes:
            raise RegistrationError(
                f"head dimension {self.head_dim} is not supported by vLLM's attention backend {backend.get_name()}, "
                f"which has {sorted(sizes)}"
            )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        """`[tokens, heads, value_dim]`; `sequences` is vLLM's affair."""
        size = self.head_dim
        q, k, v = (filled(t, size) for t in (q, k, v))
        out = self.attention(q.flatten(-2), k.flatten(-2), v.flatten(-2)).view(q.shape)
        return out if self.spec.v_dim == size else out[..., : self.spec.v_dim]

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By vLLM's operator, in place, where it takes these tensors."""
        if torch.compiler.is_compiling():
            return rotate_heads(q, k, cos, sin)  # the compiler fuses it; the table below lives in Python
        if not takes_rotary(q, cos) or cos.shape[:-1] != (*q.shape[:-2], 1):
            return rotate_heads(q, k, cos, sin)
        table, rows = self._rotary.of(self, cos, sin)
        flat_q, flat_k = (t.flatten(-2).view(len(rows), -1) for t in (q, k))
        rotate_in_place(rows, flat_q, flat_k, q.shape[-1], table)
        return q, k


def _features(spec: AttentionSpec, sinks: torch.Tensor | None) -> dict[str, Any]:
    """What only some backends have: handed over where it is asked for."""
    features: dict[str, Any] = {}
    if spec.softcap is not None:
        features["logits_soft_cap"] = spec.softcap
    if spec.alibi_slopes is not None:
        features["alibi_slopes"] = list(spec.alibi_slopes)
    if sinks is not None:
        features["sinks"] = sinks
    return features


def paged_attention_factory(vllm_config: VllmConfig, exact: bool = False) -> AttentionFactory:
    """Makes the attention cores of one model; a layer without an index takes the next one, for a name of its own.

    `exact`: a token's output depends on its sequence alone (exact mode; on CUDA vLLM's batch-invariant mode does it).
    """
    next_index = count()
    rotary = RotaryTable()

    def create(spec: AttentionSpec, sinks: torch.Tensor | None = None) -> PagedAttention:
        index = next(next_index) if spec.layer_index is None else spec.layer_index
        return PagedAttention(spec, vllm_config, f"model.layers.{index}.self_attn.attn", sinks, rotary, exact)

    return create
