"""GGUF metadata as fields of config.json. Every key is carried, known to have no effect, or rejected by name.

Source: llama.cpp's `gguf-py/gguf/constants.py` and `convert_hf_to_gguf.py`, and GGUF's specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert.accounting import rotary_frequencies
from polyshard.core.errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Keys without the architecture's prefix, and the corresponding fields.
_CARRIED = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_theta",
}
_HANDLED = {
    *("rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
# Keys of other models, with the values at which they have no effect.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


def config_of(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the fields of config.json for a GGUF file.

    Args:
        path: the file, for errors.
        fields: its metadata.
        tensors: names and shapes of its tensors, which show whether there are biases and an untied head.

    Raises:
        CheckpointError: a key is unknown or has a value that the configuration cannot express.
    """
    family = fields["general.architecture"]
    own = {key.removeprefix(f"{family}."): value for key, value in fields.items() if key.startswith(f"{family}.")}
    unknown = [f"{family}.{key}={own[key]!r}" for key in own if key not in (*_CARRIED, *_HANDLED, *_NEUTRAL)]
    unknown += [f"{family}.{key}={own[key]!r}" for key, same in _NEUTRAL.items() if key in own and own[key] not in same]
    lists = [f"{family}.{key}" for key in own if isinstance(own[key], list)]
    if unknown or lists:
        raise CheckpointError(
            f"{path} has unsupported metadata: got {', '.join((unknown + lists)[:5])}, expected that of a dense "
            f"{family}. Convert the model's Hugging Face directory instead."
        )
    missing = [key for key in _CARRIED if key not in own and key not in ("vocab_size", "rope.freq_base")]
    if missing and missing != ["attention.head_count_kv"]:
        raise CheckpointError(f"{path} is incomplete: {family}.{missing[0]} is missing in its metadata. Copy it again.")
    config: dict[str, Any] = {field: own[key] for key, field in _CARRIED.items() if key in own}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)  # llama.cpp's default
    config["vocab_size"] = tensors["token_embd.weight"][0] if "token_embd.weight" in tensors else config["vocab_size"]
    config["head_dim"] = _head_dim(path, family, own, config)
    config |= {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if "blk.0.attn_output.bias" in tensors or ("blk.0.attn_q.bias" in tensors and family != "qwen2"):
        config["attention_bias"] = True
    if "blk.0.ffn_down.bias" in tensors:
        config["mlp_bias"] = True
    for key, field in _TOKENS.items():
        config[field] = fields.get(f"tokenizer.ggml.{key}")
    scaling = _scaling(path, family, own)
    if scaling:
        config["rope_scaling"] = scaling
    return config


def scaling_of_factors(path: Path, config: Mapping[str, Any], factors: torch.Tensor) -> dict[str, Any] | None:
    """Return the rotary scaling that `rope_freqs.weight` encodes; llama.cpp divides the frequencies by its values.

    Args:
        path: the file, for errors.
        config: fields of config.json without a scaling.
        factors: the tensor.

    Raises:
        CheckpointError: no llama3 scaling has these factors.
    """
    if bool((factors == 1).all()):
        return None
    plain = rotary_frequencies(DecoderSpec.of(config))
    assert plain is not None
    wanted = plain / factors.float()
    for length in (2**n for n in range(6, 21)):
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": length,
        }
        found = rotary_frequencies(DecoderSpec.of({**config, "rope_scaling": scaling}))
        if found is not None and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=0):
            return scaling
    raise CheckpointError(
        f"{path}: rope_freqs.weight is unsupported: got factors from {float(factors.min()):.4g} to "
        f"{float(factors.max()):.4g}, expected those of a llama3 scaling. Convert the model's Hugging Face directory "
        "instead."
    )


def _head_dim(path: Path, family: str, own: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    default = config["hidden_size"] // config["num_attention_heads"]
    size = own.get("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, size) != size:
            if "attention.key_length" not in own and key == "rope.dimension_count":
                size = own[key]  # a file without key_length; shapes of the weights reveal a partial embedding
                continue
            raise CheckpointError(
                f"{path} has unsupported metadata: got {family}.{key}={own[key]}, expected the head size {size}."
            )
    return size


def _scaling(path: Path, family: str, own: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor}
        if "rope.scaling.original_context_length" in own:
            scaling["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
        return scaling
    raise CheckpointError(
        f"{path} has unsupported metadata: got {family}.rope.scaling.type={kind!r}, expected none, linear or yarn. "
        "Convert the model's Hugging Face directory instead."
    )
