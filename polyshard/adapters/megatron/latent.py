"""Multi-head latent attention in Megatron-Core's checkpoints: its names, and the arguments that determine it.

Source: `megatron/core/transformer/multi_latent_attention.py`, `MLATransformerConfig` and
`models/common/embeddings/yarn_rotary_pos_embedding.py` of Megatron-Core 0.16; `get_mscale` and
`_compute_yarn_parameters` of transformers 5. Queries, keys and values of a head have the same order in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polyshard.config.decoder_spec import DecoderSpec, Rope
from polyshard.config.latent_spec import LatentSpec

_NOT_OF_LATENT = ("add_qkv_bias", "group_query_attention", "kv_channels", "num_query_groups", "qk_layernorm")
_LATENT_EPS = 1e-6
_KNOWN_YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


def latent_names(latent: LatentSpec) -> list[tuple[tuple[str, ...], str]]:
    """Return Megatron's names and Hugging Face's name of each tensor of a layer's attention.

    Transformer Engine keeps the latents' norms in the projections after them.
    """
    mine, theirs = "self_attention.", "self_attn."
    found: list[tuple[tuple[str, ...], str]] = [
        (("input_layernorm.weight",), "input_layernorm.weight"),
        ((f"{mine}linear_kv_down_proj.weight",), f"{theirs}kv_a_proj_with_mqa.weight"),
        (
            (f"{mine}linear_kv_up_proj.layer_norm_weight", f"{mine}kv_layernorm.weight"),
            f"{theirs}kv_a_layernorm.weight",
        ),
        ((f"{mine}linear_kv_up_proj.weight",), f"{theirs}kv_b_proj.weight"),
        ((f"{mine}linear_proj.weight",), f"{theirs}o_proj.weight"),
    ]
    if latent.query_rank is None:
        return [*found, ((f"{mine}linear_q_proj.weight",), f"{theirs}q_proj.weight")]
    return [
        *found,
        ((f"{mine}linear_q_down_proj.weight",), f"{theirs}q_a_proj.weight"),
        ((f"{mine}linear_q_up_proj.layer_norm_weight", f"{mine}q_layernorm.weight"), f"{theirs}q_a_layernorm.weight"),
        ((f"{mine}linear_q_up_proj.weight",), f"{theirs}q_b_proj.weight"),
    ]


def latent_settings(spec: DecoderSpec) -> dict[str, Any]:
    """Return Megatron's settings of a configuration's attention; empty if it is not latent."""
    latent = spec.latent
    if latent is None:
        return {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.rank,
        "qk_head_dim": latent.plain,
        "qk_pos_emb_head_dim": latent.rotated,
        "v_head_dim": latent.value,
        "qk_layernorm": True,  # of the latents
        "rotary_base": spec.rope.theta,
        **(_yarn(spec.rope) if spec.rope.kind == "yarn" else {"rope_type": "rope", "mscale_all_dim": 0.0}),
    }


def with_latent(spec: DecoderSpec, expected: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of other attention with those of latent attention in their place.

    Args:
        spec: the decoder spec of the model.
        expected: arguments by name.
        held: those in the checkpoint.
    """
    if spec.latent is None:
        return dict(expected)
    found = {name: value for name, value in expected.items() if name not in _NOT_OF_LATENT} | latent_settings(spec)
    if spec.rope.kind == "default" and (_kind(held) == "rope" or _factor(held) == 1):
        del found["rope_type"]  # YaRN by 1 changes nothing
        if _magnitude(_factor(held), held.get("mscale_all_dim") or 0.0) == 1:
            del found["mscale_all_dim"]
    return found


def latent_differences(spec: DecoderSpec, held: Mapping[str, Any]) -> list[str]:
    """Return why Megatron's latent attention cannot be the configuration's, whatever its arguments are."""
    latent, rope = spec.latent, spec.rope
    if latent is None:
        return []
    found = []
    if latent.bias:
        found.append("attention_bias=true: Megatron's latent attention has no biases")
    if not latent.interleaved:
        found.append("rope_interleave=false: Megatron's latent attention rotates neighbouring channels")
    yarn = rope.kind == "yarn" and set(dict(rope.parameters)) <= _KNOWN_YARN and bool(_yarn(rope))
    if rope.kind != "default" and not yarn:
        found.append(f"rotary scaling {rope.kind} with {dict(rope.parameters)}: Megatron's latent attention has none")
    if held and held.get("multi_latent_attention") is None:  # `with_latent` compares it if it is there
        found.append("multi_latent_attention: the checkpoint's arguments lack it, the configuration says True")
    if _kind(held) == "yarn" and rope.kind == "default" and _factor(held) != 1:
        found.append(
            f"rotary scaling: the checkpoint's arguments say yarn by {_factor(held)}, the configuration default"
        )
    return found


def latent_notes(spec: DecoderSpec) -> tuple[str, ...]:
    """Return a note if the norms of latents have another epsilon in transformers, which ignores rms_norm_eps there."""
    if spec.latent is None or spec.norm_eps == _LATENT_EPS:
        return ()
    return (
        f"the norms of latents add {spec.norm_eps} in Megatron and {_LATENT_EPS} in transformers, whatever "
        "rms_norm_eps is: logits differ a little",
    )


def _kind(held: Mapping[str, Any]) -> str | None:
    """Return the type of rotary embedding in a checkpoint's arguments; that of latent attention is YaRN by default."""
    return held.get("rope_type") or ("yarn" if held.get("multi_latent_attention") else None)


def _factor(held: Mapping[str, Any]) -> float:
    """Return the factor of a checkpoint's rotary scaling, by default that of `MLATransformerConfig`."""
    value = held.get("rotary_scaling_factor")
    return 40.0 if value is None else value


def _yarn(rope: Rope) -> dict[str, Any]:
    """Return Megatron's settings of YaRN; empty if it has none that scale as transformers does."""
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if not (mscale and all_dim):  # transformers then takes 1 and 0
        if all_dim or mscale not in (None, 0, 1):
            return {}
        mscale, all_dim = 1.0, 0.0
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope.get("factor")),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings"),
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(mscale),
        "mscale_all_dim": float(all_dim),
    }


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
