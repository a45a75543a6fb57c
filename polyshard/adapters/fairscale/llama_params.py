"""Conversion between Meta's `params.json` and config.json.

Sources: `ModelArgs` in meta-llama/llama, llama3 and llama-models, transformers' convert_llama_weights_to_hf.py, and
Mistral's first releases, which use the same files with `head_dim`, `hidden_dim` and `sliding_window`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyshard.config.decoder_spec import DecoderSpec, foreign_fields
from polyshard.core.errors import CheckpointError

# Constants in apply_scaling of Meta's code, for every model with use_scaled_rope.
SCALED_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Fields that determine what the model computes, or its size.
_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "multiple_of"),
    *("ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_scaling"),
    "sliding_window",
}
# Fields that only limit caches and batches.
_LIMITS = {"max_seq_len", "max_batch_size", "max_position_embeddings"}


def read_params(path: Path) -> dict[str, Any]:
    """Return the fields of `params.json`.

    Raises:
        CheckpointError: the file is missing, damaged, or has an unsupported field.
    """
    file = path / "params.json"
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist. Pass --config DIRECTORY with the model's config.json")
    try:
        params = json.loads(file.read_text())
        assert isinstance(params, dict)
    except (ValueError, AssertionError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    unknown = sorted(name for name in set(params) - _KNOWN - _LIMITS if params[name] not in (None, False))
    if unknown:
        raise CheckpointError(
            f"{file} has unsupported fields: got {', '.join(f'{n}={params[n]!r}' for n in unknown)}, expected those "
            "of a dense Llama without adapters or quantization. Convert it with the model's own tools."
        )
    missing = sorted({"dim", "n_layers", "n_heads"} - set(params))
    if missing:
        raise CheckpointError(f"{file} is incomplete: {', '.join(missing)} is missing. Copy it again.")
    return params


def config_of(path: Path, params: Mapping[str, Any], intermediate: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    """Return the fields of config.json for a model that Meta's params describe.

    Args:
        path: the checkpoint, for errors.
        params: the fields of `params.json`; see `read_params`.
        intermediate: width of the MLP, from the weights.
        vocabulary: number of rows of the head, from the weights.
        tied: whether the head shares the embedding's weight.
    """
    heads = params["n_heads"]
    stated = params.get("vocab_size", -1)
    if stated > 0 and stated != vocabulary:
        raise CheckpointError(
            f"{path} is incomplete: params.json says vocab_size={stated}, got {vocabulary} rows of output.weight in "
            "all files. Copy all consolidated.NN.pth."
        )
    if stated <= 0:
        raise CheckpointError(f"{path / 'params.json'} does not contain the vocabulary size. Pass --config DIRECTORY")
    if params.get("hidden_dim", intermediate) != intermediate:
        raise CheckpointError(
            f"{path} is incomplete: params.json says hidden_dim={params['hidden_dim']}, got {intermediate} rows of w1 "
            "in all files. Copy all consolidated.NN.pth."
        )
    window = params.get("sliding_window")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
        "model_type": "llama" if window is None else "mistral",
        "hidden_size": params["dim"],
        "intermediate_size": intermediate,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or params["dim"] // heads,
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "vocab_size": vocabulary,
        "max_position_embeddings": params.get("max_position_embeddings") or params.get("max_seq_len", 2048),
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }
    if window is not None:
        config["sliding_window"] = window
    if params.get("use_scaled_rope"):
        given = {"factor": params["rope_scaling_factor"]} if params.get("rope_scaling_factor") else {}
        config["rope_scaling"] = {"rope_type": "llama3", **SCALED_ROPE, **given, **(params.get("rope_scaling") or {})}
        if config["max_position_embeddings"] == 2048:  # params.json of Llama 3.1 does not contain it
            config["max_position_embeddings"] = 131072
    elif params.get("rope_scaling"):
        raise CheckpointError(
            f"{path / 'params.json'} contradicts itself: got rope_scaling without use_scaled_rope=true. Correct it."
        )
    return config


def params_of(config: Mapping[str, Any], spec: DecoderSpec) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return Meta's params of a model, and notes.

    Raises:
        CheckpointError: Meta's params cannot express the model.
    """
    wrong = foreign_fields(config)
    if spec.qkv_bias or spec.output_bias or spec.mlp_bias:
        wrong.append("biases")
    if spec.qk_norm:
        wrong.append("QK norms")
    if spec.activation not in ("silu", "swish"):
        wrong.append(f"hidden_act={spec.activation!r}")
    if len(set(spec.windows)) > 1:
        wrong.append("sliding windows on some layers")
    rope = spec.rope
    scaled = rope.kind == "llama3" and set(dict(rope.parameters)) == set(SCALED_ROPE)
    if not scaled and (rope.kind != "default" or rope.parameters):
        wrong.append(f"rotary scaling {rope.kind} with {dict(rope.parameters)}")
    if wrong:
        raise CheckpointError(
            f"Llama's format has no place for {'; '.join(wrong)}: expected a decoder without biases and QK norms, "
            "with SwiGLU and rotary scaling default or llama3. Write huggingface instead."
        )
    params: dict[str, Any] = {
        "dim": spec.hidden,
        "n_layers": spec.layers,
        "n_heads": spec.heads,
        "n_kv_heads": spec.kv_heads,
        "vocab_size": spec.vocabulary,
        "norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta,
        "max_seq_len": config.get("max_position_embeddings", 2048),
    }
    notes: list[str] = []
    beyond: list[str] = []  # fields that Meta's own code does not read
    if spec.head_dim * spec.heads != spec.hidden:
        params["head_dim"] = spec.head_dim
        beyond.append("head_dim")
    if spec.windows[0] is not None:
        params["sliding_window"] = spec.windows[0]
        beyond.append("sliding_window")
    if scaled:
        params["use_scaled_rope"] = True
        if dict(rope.parameters) != SCALED_ROPE:
            params["rope_scaling"] = dict(rope.parameters)
            beyond.append("rope_scaling (Meta's code has the constants of Llama 3.1 built in)")
    if beyond:
        notes.append(
            f"params.json holds {', '.join(beyond)}, which polyshard reads and Meta's own code ignores: Meta's code "
            "computes another model"
        )
    return params, tuple(notes)
