"""Megatron's arguments, which its checkpoints store beside the weights: those that determine what the model computes.

Source: `megatron/training/checkpointing.py` (`load_args_from_checkpoint`) and `arguments.py` of Megatron-LM. A field of
config.json without a matching argument makes writing fail; an argument that contradicts config.json makes reading
fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.adapters.megatron.expert_arguments import (
    NEUTRAL_OF_EXPERTS,
    expected_of_experts,
    expert_arguments,
    expert_differences,
)
from polyshard.adapters.megatron.latent import latent_differences, latent_settings, with_latent
from polyshard.config.decoder_spec import DecoderSpec, Rope, foreign_fields
from polyshard.core.errors import CheckpointError

# Megatron fixes these three if its arguments set use_rope_scaling (RotaryEmbedding._apply_scaling).
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# Arguments of models that are not Llama-like decoders, with the values that have no effect.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "attention_output_gate": (None, False),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (None, 0, 0.0),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "layernorm_zero_centered_gamma": (None, False),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (None, False),
    "no_rope_freq": (None,),
    "openai_gelu": (None, False),
    "qk_l2_norm": (None, False),
    "quick_geglu": (None, False),
    "rotary_interleaved": (None, False),
    "softmax_scale": (None,),
    "softmax_type": (None, "vanilla"),
    "squared_relu": (None, False),
    "use_mup": (None, False),
}


def arguments_of(spec: DecoderSpec, config: Mapping[str, Any], padded: int, multiple: int) -> dict[str, Any]:
    """Return Megatron's arguments of a model.

    Args:
        spec: the decoder spec of the model.
        config: the fields of its config.json.
        padded: number of rows of the padded vocabulary.
        multiple: the multiple to which the vocabulary is padded.

    Raises:
        CheckpointError: Megatron's arguments cannot express the model.
    """
    unsupported = foreign_fields(config)
    if spec.activation not in ("silu", "swish"):
        unsupported.append(f"hidden_act={spec.activation!r}")
    if spec.output_bias != spec.mlp_bias or (spec.mlp_bias and not spec.qkv_bias):
        unsupported.append(
            f"biases of q, k and v {spec.qkv_bias}, of the output projection {spec.output_bias}, of the MLP "
            f"{spec.mlp_bias} (add_bias_linear adds a bias to all of them, add_qkv_bias only to q, k and v)"
        )
    if len({window for window in spec.windows if window is not None}) > 1:
        unsupported.append(f"sliding windows {sorted({str(window) for window in spec.windows})}")
    rope = spec.rope
    extra = {k: v for k, v in rope.parameters if k not in ("factor", "partial_rotary_factor")}
    linear = rope.kind == "linear" and not extra and float(rope.get("factor", 0.5)).is_integer()
    llama3 = rope.kind == "llama3" and extra == LLAMA3
    if not (spec.latent or linear or llama3 or (rope.kind == "default" and not extra)):
        unsupported.append(f"rotary scaling {rope.kind} with {dict(rope.parameters)}")
    unsupported += expert_differences(spec, expert_arguments(spec)) + latent_differences(spec, latent_settings(spec))
    if unsupported:
        raise CheckpointError(
            f"Megatron's arguments cannot express this model: got {'; '.join(unsupported)}, expected a decoder "
            f"with SwiGLU and rotary scaling default, linear by an integer, or llama3 with {LLAMA3}. Write "
            "huggingface instead."
        )
    sliding = [int(window is not None) for window in spec.windows]
    window = next((window for window in spec.windows if window is not None), None)
    arguments = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "ffn_hidden_size": spec.intermediate,
        "num_attention_heads": spec.heads,
        "group_query_attention": spec.kv_heads != spec.heads,
        "num_query_groups": spec.kv_heads,
        "kv_channels": spec.head_dim,
        "max_position_embeddings": config.get("max_position_embeddings"),
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(rope.theta) if rope.theta.is_integer() else rope.theta,
        "rotary_percent": rope.get("partial_rotary_factor", 1.0),
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": int(rope.get("factor")) if linear else None,
        "use_rope_scaling": llama3,
        "rope_scaling_factor": float(rope.get("factor")) if llama3 else 8.0,
        "add_bias_linear": spec.mlp_bias,
        "add_qkv_bias": spec.qkv_bias,
        "swiglu": True,
        "squared_relu": False,
        "normalization": "RMSNorm",
        "norm_epsilon": spec.norm_eps,
        "layernorm_epsilon": spec.norm_eps,
        "apply_layernorm_1p": False,
        "qk_layernorm": spec.qk_norm,
        "untie_embeddings_and_output_weights": not spec.tied,
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": None if window is None or all(sliding) else sliding,
        "vocab_size": spec.vocabulary,
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": multiple,
        "num_experts": None,
        "attention_dropout": config.get("attention_dropout") or 0.0,  # Megatron's own default is 0.1
        "hidden_dropout": 0.0,
        **expert_arguments(spec),
    }
    return with_latent(spec, arguments, {})


def check_arguments(where: object, held: Mapping[str, Any], spec: DecoderSpec) -> None:
    """Check a checkpoint's arguments against the configuration.

    Raises:
        CheckpointError: the arguments describe another model.
    """
    neutral = {**NEUTRAL, **NEUTRAL_OF_EXPERTS} if spec.experts else NEUTRAL
    if spec.latent:
        neutral = {name: same for name, same in neutral.items() if name != "multi_latent_attention"}
    wrong = [f"{name}={held[name]!r}" for name, same in neutral.items() if name in held and held[name] not in same]
    if wrong:
        raise CheckpointError(
            f"{where} is of an unsupported model: its arguments say {', '.join(wrong)}, expected a Llama-like decoder."
        )
    differences = [
        f"{name}: the checkpoint's arguments say {held[name]!r}, the configuration {expected!r}"
        for name, expected in _expected(spec, held).items()
        if held.get(name) is not None and not _equal(held[name], expected)
    ]
    differences += expert_differences(spec, held)
    differences += latent_differences(spec, held) if spec.latent else _rope_differences(held, spec.rope)
    differences += _window_differences(held, spec)
    if differences:
        raise CheckpointError(
            f"{where} is of another model than the configuration: {'; '.join(differences)}. Pass --config with the "
            "configuration that belongs to this checkpoint."
        )


def plain_arguments(stored: Any) -> dict[str, Any]:
    """Return arguments stored as a namespace or a mapping as a dict; empty if there are none."""
    return {} if stored is None else dict(stored) if isinstance(stored, Mapping) else dict(vars(stored))


def padded_rows(held: Mapping[str, Any], spec: DecoderSpec, multiple: int) -> int | None:
    """Return the number of rows of the padded vocabulary, from the arguments or the given multiple; None if unknown."""
    padded, tensor = held.get("padded_vocab_size"), held.get("tensor_model_parallel_size") or 1
    if padded is None and multiple > 1:
        return -(-spec.vocabulary // multiple) * multiple
    by = (held.get("make_vocab_size_divisible_by") or 128) * tensor
    known = held.get("vocab_size") == spec.vocabulary or -(-spec.vocabulary // by) * by == padded
    return padded if known else None


def _expected(spec: DecoderSpec, held: Mapping[str, Any]) -> dict[str, Any]:
    expected: dict[str, Any] = {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "ffn_hidden_size": spec.intermediate,
        "num_attention_heads": spec.heads,
        "kv_channels": spec.head_dim,
        "position_embedding_type": "rope",
        "rotary_base": spec.rope.theta,
        "rotary_percent": spec.rope.get("partial_rotary_factor", 1.0),
        "swiglu": spec.activation in ("silu", "swish"),
        "normalization": "RMSNorm",
        "norm_epsilon": spec.norm_eps,
        "layernorm_epsilon": spec.norm_eps,
        "qk_layernorm": spec.qk_norm,
        "untie_embeddings_and_output_weights": not spec.tied,
        "add_bias_linear": spec.mlp_bias and spec.output_bias,
    }
    if held.get("group_query_attention"):
        expected["num_query_groups"] = spec.kv_heads
    elif "group_query_attention" in held:
        expected["group_query_attention"] = spec.kv_heads != spec.heads
    if not held.get("add_bias_linear"):
        expected["add_qkv_bias"] = spec.qkv_bias
    if held.get("vocab_size") is not None:
        expected["vocab_size"] = spec.vocabulary
    if spec.experts and all(spec.experts.sparse):
        del expected["ffn_hidden_size"]  # no layer has this width
    return with_latent(spec, expected, held) | expected_of_experts(spec, held)


def _rope_differences(held: Mapping[str, Any], rope: Rope) -> list[str]:
    if "use_rope_scaling" not in held and "rotary_seq_len_interpolation_factor" not in held:
        return []
    stored = Rope(kind="default", theta=rope.theta)
    if held.get("use_rope_scaling"):
        parameters = {**LLAMA3, "factor": float(held.get("rope_scaling_factor") or 8.0)}
        stored = Rope(kind="llama3", theta=rope.theta, parameters=tuple(sorted(parameters.items())))
    elif (held.get("rotary_seq_len_interpolation_factor") or 1) != 1:
        factor = float(held["rotary_seq_len_interpolation_factor"])
        stored = Rope(kind="linear", theta=rope.theta, parameters=(("factor", factor),))
    wanted = tuple((k, v) for k, v in rope.parameters if k != "partial_rotary_factor")
    if (stored.kind, stored.parameters) == (rope.kind, wanted):
        return []
    said = f"rotary scaling {stored.kind} with {dict(stored.parameters)}"
    return [f"the checkpoint's arguments say {said}, the configuration {rope.kind} with {dict(wanted)}"]


def _window_differences(held: Mapping[str, Any], spec: DecoderSpec) -> list[str]:
    if "window_size" not in held:
        return []
    size, skip = held["window_size"], held.get("window_attn_skip_freq")
    windows: list[int | None] = [None] * spec.layers
    if size:
        every = [1] * spec.layers if skip is None else skip
        every = [int((i + 1) % skip != 0) for i in range(spec.layers)] if isinstance(skip, int) else every
        windows = [size[0] + 1 if here else None for here in every]
    if windows == list(spec.windows):
        return []
    return [f"the checkpoint's arguments say windows {windows}, the configuration {list(spec.windows)}"]


def _equal(stored: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(stored, (int, float)):
        return abs(stored - expected) <= 1e-6 * abs(expected)
    if isinstance(stored, (list, tuple)) and isinstance(expected, (list, tuple)):
        return list(stored) == list(expected)
    return stored == expected
