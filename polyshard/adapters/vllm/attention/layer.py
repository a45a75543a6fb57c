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
    supports_rotary,
)
from polyshard.adapters.vllm.compat.paging import pad_last_dim
from polyshard.attention.rotary import rotate_heads
from polyshard.core.attention import AttentionFactory, AttentionSpec, PackedSequences
from polyshard.core.errors import RegistrationError

logger = logging.getLogger(__name__)


class RotaryTable:
    """Cosines and sines in the format of vLLM's operator; the first layer of a forward pass builds them for all."""

    def __init__(self) -> None:
        self._cos: torch.Tensor | None = None
        self._builder: object = None
        self._table = self._rows = torch.empty(0)

    def get(self, layer: object, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the table `[tokens, rotary_dim]`, and each token's row in it.

        A second call by the layer that built the table means that a new forward pass has begun.
        """
        if self._cos is not cos or self._builder is layer:
            self._cos, self._builder = cos, layer
            self._table = torch.cat((cos, sin), dim=-1).flatten(0, -2)
            # Always recomputed on a GPU: a captured graph would keep reading rows that a later batch size replaced.
            if cos.device.type != "cpu" or len(self._rows) != len(self._table):
                self._rows = torch.arange(len(self._table), device=cos.device)
        return self._table, self._rows


class PagedAttention(nn.Module):
    """`AttentionCore` on vLLM's attention layer, which reads batch and cache from vLLM's forward context.

    The cache stores keys and values of one head dimension, on CPU one of a few. Smaller heads are padded with zeros,
    which changes neither scores nor outputs.
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
            raise RegistrationError("vLLM serves only causal attention: got causal=False. Serve a causal decoder")
        self.spec = spec
        needed = max(spec.head_dim, spec.v_dim)
        on_cpu = vllm_config.device_config.device_type == "cpu"
        self.head_dim = (cpu_head_size(needed) if on_cpu else None) or needed
        if self.head_dim != needed and spec.layer_index in (None, 0):
            logger.info(
                "heads of %d are padded to %d in the KV cache: vLLM has no smaller kernel", needed, self.head_dim
            )
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
                quant_config=None,  # otherwise it has KV cache scales as parameters, which few checkpoints contain
                per_layer_sliding_window=spec.sliding_window,
                prefix=layer_name,
                attn_backend=backend,
                **features,
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            requested = ["sliding_window"] * (spec.sliding_window is not None) + sorted(features)
            raise RegistrationError(
                f"{layer_name} is unsupported by vLLM's attention (requested features: "
                f"{', '.join(requested) or 'none'}): {error}"
            ) from error
        if self.attention.sliding_window != spec.sliding_window:
            # vLLM falls back to the config's window if a layer passes none.
            raise RegistrationError(
                f"{layer_name} requests sliding_window={spec.sliding_window}, but vLLM reads "
                f"{self.attention.sliding_window} from the model's config. Make them equal, for a model without a "
                "window with hf_overrides={'sliding_window': None}"
            )
        backend = self.attention.attn_backend
        sizes = getattr(backend, "get_supported_head_sizes", list)()
        if sizes and self.head_dim not in sizes:
            raise RegistrationError(
                f"the head dimension is unsupported by vLLM's attention backend {backend.get_name()}: got "
                f"{self.head_dim}, expected one of {sorted(sizes)}"
            )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        """Return the attention output `[tokens, heads, value_dim]`; `sequences` is ignored, since vLLM has its own."""
        size = self.head_dim
        q, k, v = (pad_last_dim(t, size) for t in (q, k, v))
        out = self.attention(q.flatten(-2), k.flatten(-2), v.flatten(-2)).view(q.shape)
        return out if self.spec.v_dim == size else out[..., : self.spec.v_dim]

    def use_sinks(self, sinks: torch.Tensor) -> None:
        """Use these sinks `[heads]` from now on. vLLM keeps the tensor it got first, or a float32 copy of it."""
        self.attention.impl.sinks = sinks  # pyrefly: ignore  # of every backend with sinks

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate in place with vLLM's operator if it supports these tensors; else with torch operations."""
        if torch.compiler.is_compiling():
            return rotate_heads(q, k, cos, sin)  # the compiler fuses it, and cannot trace the table below
        if not supports_rotary(q, cos) or cos.shape[:-1] != (*q.shape[:-2], 1):
            return rotate_heads(q, k, cos, sin)
        table, rows = self._rotary.get(self, cos, sin)
        flat_q, flat_k = (t.flatten(-2).view(len(rows), -1) for t in (q, k))
        rotate_in_place(rows, flat_q, flat_k, q.shape[-1], table)
        return q, k


def _features(spec: AttentionSpec, sinks: torch.Tensor | None) -> dict[str, Any]:
    """Return arguments for features that only some backends support, if the layer requests them."""
    features: dict[str, Any] = {}
    if spec.softcap is not None:
        features["logits_soft_cap"] = spec.softcap
    if spec.alibi_slopes is not None:
        features["alibi_slopes"] = list(spec.alibi_slopes)
    if sinks is not None:
        features["sinks"] = sinks
    return features


def paged_attention_factory(vllm_config: VllmConfig, exact: bool = False) -> AttentionFactory:
    """Return a factory of attention cores for one model; a layer without an index gets the next one.

    Args:
        vllm_config: vLLM's configuration of the model.
        exact: exact mode: a token's output depends only on its sequence. On CUDA vLLM's batch-invariant mode does this.
    """
    next_index = count()
    rotary = RotaryTable()

    def create(spec: AttentionSpec, sinks: torch.Tensor | None = None) -> PagedAttention:
        index = next(next_index) if spec.layer_index is None else spec.layer_index
        return PagedAttention(spec, vllm_config, f"model.layers.{index}.self_attn.attn", sinks, rotary, exact)

    return create
