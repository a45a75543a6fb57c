"""The factory that plans a model by its config alone: Llama-like decoders, DeepSeek's attention, and experts.

It has the shapes of the model that a config describes and reads no checkpoint: a user's factory is planned as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from polyshard.attention import RotaryEmbedding, TrainableFlashAttention, TrainableMLA
from polyshard.attention.defaults import sequence_positions
from polyshard.config.families import OPTIONAL, complete_config
from polyshard.config.fields import config_fields
from polyshard.config.file import REQUIRED
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.experts.layer import SharedExperts, mixture_of_experts
from polyshard.experts.router import Router
from polyshard.layers.activation import swiglu
from polyshard.layers.linear import column_parallel, row_parallel
from polyshard.layers.norm import rms_norm
from polyshard.layers.pipeline import pipeline_stage, stage_layers
from polyshard.layers.vocabulary import lm_head, vocab_embedding

EXPERT_FAMILIES = ("deepseek_v3", "mixtral", "qwen3_moe")
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")


def number_of_experts(fields: Mapping[str, Any]) -> int:
    """Return the number of routed experts of a layer; 0 for a dense model."""
    return next((int(fields[name]) for name in _EXPERTS if fields.get(name)), 0)


def number_of_layers(fields: Mapping[str, Any]) -> int:
    """Return the number of blocks; 1 if the config does not say."""
    return int(fields.get("num_hidden_layers") or fields.get("num_layers") or fields.get("n_layer") or 1)


def left_out(fields: Mapping[str, Any]) -> list[str]:
    """Return what the planned model leaves out of the one that the config describes."""
    notes = []
    if fields.get("num_nextn_predict_layers"):
        notes.append(f"left out: {fields['num_nextn_predict_layers']} layer(s) of multi-token prediction")
    if number_of_experts(fields):
        notes.append("experts are planned with equal loads, without capacity and without load balancing losses")
    return notes


class _MLP(nn.Module):
    def __init__(self, hidden: int, inner: int, context: ParallelContext, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = column_parallel(hidden, [inner, inner], context, bias=bias, names=["gate_proj", "up_proj"])
        self.down_proj = row_parallel(inner, hidden, context, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(x, self.gate_up))


def _experts(config: Any, context: ParallelContext) -> nn.Module:
    """Return routed experts, and shared ones that see every token."""
    inner = config.moe_intermediate_size or config.intermediate_size
    shared = inner * config.n_shared_experts
    return mixture_of_experts(
        config.hidden_size,
        inner,
        config.experts,
        config.num_experts_per_tok,
        context,
        router=Router(normalize=True),
        shared=SharedExperts(size=shared) if shared else None,
    )


class _Block(nn.Module):
    def __init__(self, config: Any, context: ParallelContext, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = rms_norm(size, context, eps=eps)
        self.self_attn = _attention(config, context, index)
        self.post_attention_layernorm = rms_norm(size, context, eps=eps)
        sparse = config.experts and index >= config.first_k_dense_replace and index not in config.mlp_only_layers
        sparse = sparse and (index + 1) % config.decoder_sparse_step == 0
        bias = config.mlp_bias
        self.mlp = _experts(config, context) if sparse else _MLP(size, config.intermediate_size, context, bias)

    def forward(self, x: torch.Tensor, rotary: Any) -> torch.Tensor:
        x = self.self_attn(self.input_layernorm(x), rotary=rotary, residual=x)
        return x + self.mlp(self.post_attention_layernorm(x))


def _attention(config: Any, context: ParallelContext, index: int) -> nn.Module:
    if config.kv_lora_rank:
        return TrainableMLA(
            config.hidden_size,
            config.num_attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            parallel_context=context,
            layer_index=index,
        )
    return TrainableFlashAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        parallel_context=context,
        qkv_bias=config.model_type == "qwen2" or config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm_eps=config.rms_norm_eps if config.model_type.startswith("qwen3") else None,
        sliding_window=config.layer_windows[index],
        layer_index=index,
    )


class PlannedDecoder(nn.Module):
    """The planned language model; see the module's description."""

    def __init__(self, config: Any, context: ParallelContext) -> None:
        super().__init__()
        self.context, self.stage = context, pipeline_stage(config.num_hidden_layers, context)
        vocabulary, size, tied = config.vocab_size, config.hidden_size, config.tie_word_embeddings
        if self.stage.first or (self.stage.last and tied):
            self.embed_tokens = vocab_embedding(vocabulary, size, context)
        self.layers = stage_layers(self.stage, lambda index: _Block(config, context, index))
        self.rotary = RotaryEmbedding(config.qk_rope_head_dim or config.head_dim)
        if self.stage.last:
            self.norm = rms_norm(size, context, eps=config.rms_norm_eps)
            self.lm_head = lm_head(size, vocabulary, context, tied_to=self.embed_tokens if tied else None)

    def forward(self, input_ids: torch.Tensor, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Return hidden states `[batch, seq, hidden]`."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = self.rotary(sequence_positions(input_ids, None, self.context), x.dtype)
        for layer in self.layers:
            x = layer(x, rotary=rotary)
        return self.norm(x) if self.stage.last else x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's logits."""
        return self.lm_head(hidden)


def planned_decoder(config: Any, parallel_context: ParallelContext) -> PlannedDecoder:
    """Build the model that a config describes, for planning.

    Raises:
        ConfigurationError: the family is not one that can be planned without a factory.
    """
    return PlannedDecoder(_settings(config), parallel_context)


def _check_complete(fields: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` if the config of a model with experts lacks a size."""
    required = [*REQUIRED, "num_experts_per_tok"]
    if fields.get("kv_lora_rank"):
        required += ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    else:
        required.append("num_key_value_heads")
    missing = [name for name in required if fields.get(name) is None]
    if not number_of_experts(fields):
        missing.append(" or ".join(_EXPERTS))
    if missing:
        raise ConfigurationError(
            f"the config of model_type {fields['model_type']!r} is incomplete: {', '.join(missing)} missing. Add them "
            "to config.json."
        )


def _settings(config: Any) -> SimpleNamespace:
    fields = dict(config_fields(config))
    family = fields.get("model_type")
    if family not in (*OPTIONAL, *EXPERT_FAMILIES):
        raise ConfigurationError(
            f"model_type {family!r} cannot be planned without its factory: expected one of "
            f"{', '.join(sorted((*OPTIONAL, *EXPERT_FAMILIES)))}. Pass factory=."
        )
    defaults = dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "moe_intermediate_size"))
    defaults |= {"first_k_dense_replace": 0, "mlp_only_layers": (), "decoder_sparse_step": 1, "n_shared_experts": 0}
    defaults |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "head_dim": None}
    if family in OPTIONAL:
        return SimpleNamespace(**{**defaults, **vars(complete_config(config)), "experts": 0})
    _check_complete(fields)
    known = {name: value for name, value in fields.items() if value is not None}
    found = SimpleNamespace(**{**defaults, **known, "experts": number_of_experts(fields)})
    found.head_dim = found.head_dim or found.hidden_size // found.num_attention_heads
    found.layer_windows = (None,) * found.num_hidden_layers
    found.mlp_only_layers = tuple(found.mlp_only_layers)
    return found
