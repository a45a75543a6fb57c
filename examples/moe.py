"""Mixture-of-experts decoders in one file: Qwen3-MoE, Mixtral, DeepSeek-V3 and gpt-oss.

The families differ in their router, in the names of the experts' weights, and in attention: grouped queries, with QK
norms or sinks, or multi-head latent attention. Training and serving both call the factory `build_model` with a config
and a parallel context.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import polyshard as ps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes a family's mixture-of-experts layer.

    Attributes:
        router: the router, from a config.
        block: name of the layer in a checkpoint.
        size: field of the expert size in the config.
        options: further arguments of `ps.mixture_of_experts`.
    """

    router: Callable[[Any], ps.Router]
    block: str = "mlp"
    size: str = "moe_intermediate_size"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "qwen3_moe": Family(router=lambda config: ps.Router(normalize=config.norm_topk_prob)),
    "mixtral": Family(
        block="block_sparse_moe",
        router=lambda config: ps.Router(normalize=True),
        size="intermediate_size",
        options={"storage": ps.ExpertStorage(gate="w1", up="w3", down="w2")},
    ),
    "deepseek_v3": Family(
        router=lambda config: ps.Router(
            score="sigmoid",
            normalize=config.norm_topk_prob,
            correction_bias=True,
            groups=config.n_group,
            chosen_groups=config.topk_group,
            scale=config.routed_scaling_factor,
            dtype=torch.float32,
        )
    ),
    "gpt_oss": Family(
        router=lambda config: ps.Router(score="softmax_of_chosen", bias=True),
        size="intermediate_size",
        options={
            "storage": ps.ExpertStorage(stacked="gate_up_proj", down="down_proj", interleaved=True),
            "activation": ps.ClampedSwiglu(),
            "bias": True,
            "router_name": "router",
        },
    ),
}


def field(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of these fields that a config has; families name the same number differently."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if value is not None), default)


def experts_of(config: Any, parallel_context: ps.ParallelContext, balance: ps.Balance | None) -> nn.Module:
    """Return the mixture-of-experts layer of a config."""
    family = FAMILIES[config.model_type]
    shared = field(config, "n_shared_experts", default=0) * getattr(config, family.size)
    return ps.mixture_of_experts(
        config.hidden_size,
        getattr(config, family.size),
        field(config, "n_routed_experts", "num_local_experts", "num_experts"),
        config.num_experts_per_tok,
        parallel_context,
        router=family.router(config),
        shared=ps.SharedExperts(size=shared) if shared else None,
        balance=balance,
        **family.options,
    )


class MLP(nn.Module):
    """The dense MLP of DeepSeek's first layers, and of the layers that `mlp_only_layers` names."""

    def __init__(self, config: Any, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.gate_up = ps.column_parallel(h, [f, f], parallel_context, names=["gate_proj", "up_proj"])
        self.down_proj = ps.row_parallel(f, h, parallel_context)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Return `[..., hidden]`, the shape of the input."""
        return self.down_proj(ps.swiglu(x, self.gate_up))


def is_dense(config: Any, index: int) -> bool:
    """Return whether a layer has a dense MLP."""
    step, dense = field(config, "decoder_sparse_step", default=1), field(config, "mlp_only_layers", default=())
    return index < field(config, "first_k_dense_replace", default=0) or index in dense or (index + 1) % step != 0


def attention_of(config: Any, parallel_context: ps.ParallelContext, index: int) -> nn.Module:
    """Return the attention layer of a config."""
    if config.model_type == "deepseek_v3":
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        return ps.TrainableMLA(
            config.hidden_size,
            config.num_attention_heads,
            **{size: getattr(config, size) for size in sizes},
            scale=latent_scale(config),
            parallel_context=parallel_context,
            layer_index=index,
        )
    sinks = config.model_type == "gpt_oss"
    kinds = field(config, "layer_types", default=["full_attention"] * config.num_hidden_layers)
    slides = config.model_type == "mixtral" or kinds[index] == "sliding_attention"
    return ps.TrainableFlashAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_size(config),
        parallel_context=parallel_context,
        qkv_bias=bool(field(config, "attention_bias", default=sinks)),
        output_bias=bool(field(config, "attention_bias", default=sinks)),
        qk_norm_eps=config.rms_norm_eps if config.model_type == "qwen3_moe" else None,
        sliding_window=field(config, "sliding_window") if slides else None,
        sinks=sinks,
        layer_index=index,
    )


def head_size(config: Any) -> int:
    """Return the size of a head's rotated part."""
    if config.model_type == "deepseek_v3":
        return config.qk_rope_head_dim
    return field(config, "head_dim") or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary parameters; older files store base and scaling apart."""
    given = field(config, "rope_parameters", "rope_scaling", default={})
    return {"rope_type": "default", "rope_theta": field(config, "rope_theta", default=10_000.0), **given}


def latent_scale(config: Any) -> float:
    """Return the factor on q·k of latent attention, which YaRN enlarges."""
    rope, scale = rope_of(config), (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    mscale = rope.get("mscale_all_dim", 0) if rope["rope_type"] == "yarn" else 0
    return scale * (0.1 * mscale * math.log(rope["factor"]) + 1.0) ** 2 if mscale else scale


class Block(nn.Module):
    """Attention and experts, each with a norm before it and a residual connection."""

    def __init__(self, config: Any, context: ps.ParallelContext, index: int, balance: ps.Balance | None) -> None:
        super().__init__()
        self.input_layernorm = ps.rms_norm(config.hidden_size, context, eps=config.rms_norm_eps)
        self.self_attn = attention_of(config, context, index)
        self.post_attention_layernorm = ps.rms_norm(config.hidden_size, context, eps=config.rms_norm_eps)
        dense, self.feed = is_dense(config, index), FAMILIES[config.model_type].block
        self.add_module(self.feed, MLP(config, context) if dense else experts_of(config, context, balance))

    def forward(self, x: torch.Tensor, rotary: Any, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Return the block's output `[..., hidden]`, the shape of the input."""
        x = self.self_attn(self.input_layernorm(x), residual=x, rotary=rotary, cu_seqlens=cu_seqlens)
        return x + getattr(self, self.feed)(self.post_attention_layernorm(x), cu_seqlens=cu_seqlens)


class Transformer(nn.Module):
    """Embedding, blocks and the last norm; under pipeline parallel, this stage's part of them."""

    def __init__(self, config: Any, context: ps.ParallelContext, balance: ps.Balance | None) -> None:
        super().__init__()
        self.stage = stage = ps.pipeline_stage(config.num_hidden_layers, context)
        if stage.first:
            self.embed_tokens = ps.vocab_embedding(config.vocab_size, config.hidden_size, context)
        self.layers = ps.stage_layers(stage, lambda index: Block(config, context, index, balance))
        if stage.last:
            self.norm = ps.rms_norm(config.hidden_size, context, eps=config.rms_norm_eps)
        rope = rope_of(config)
        self.rotary = ps.RotaryEmbedding(
            head_size(config),
            theta=float(rope["rope_theta"]),
            scaling=rope if rope["rope_type"] != "default" else None,
            max_position=config.max_position_embeddings,
        )


class Decoder(nn.Module):
    """The language model. Its parameters have the names of a Hugging Face checkpoint."""

    def __init__(self, config: Any, context: ps.ParallelContext, balance: ps.Balance | None) -> None:
        super().__init__()
        self.config, self.parallel_context = config, context
        self.model = Transformer(config, context, balance)
        if self.model.stage.last:
            self.lm_head = ps.lm_head(config.hidden_size, config.vocab_size, context)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden states `[..., hidden]` of token IDs `[batch, seq]`, or packed `[tokens]`.

        With `targets`, the next token of each token, return their float32 log-probabilities instead. A later pipeline
        stage takes the output of the previous one as `inputs_embeds`.
        """
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if positions is None:
            positions = ps.sequence_positions(input_ids, cu_seqlens, self.parallel_context)
        rotary = self.model.rotary(positions, x.dtype)
        for layer in self.model.layers:
            x = layer(x, rotary, cu_seqlens)
        hidden = self.model.norm(x) if self.model.stage.last else x
        if targets is None:
            return hidden
        context, vocab_size = self.parallel_context, self.config.vocab_size
        return ps.lm_logprobs(hidden, self.compute_logits, targets, context, vocab_size=vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of token IDs."""
        return self.model.embed_tokens(input_ids)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of the logits; `polyshard.gather_logits` returns the full logits."""
        return self.lm_head(hidden)


def build_model(config: Any, parallel_context: ps.ParallelContext, balance: ps.Balance | None = None) -> Decoder:
    """Build the model from a Hugging Face config (or an object with its attributes) and a parallel context."""
    if config.model_type not in FAMILIES:
        raise ps.ConfigurationError(f"moe.py has {', '.join(FAMILIES)}, not model_type={config.model_type!r}")
    return Decoder(config, parallel_context, balance)
