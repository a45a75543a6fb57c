"""Fields of config.json whose defaults and meaning differ between the families of Llama-like decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.core.errors import CheckpointError

_KV_HEADS = {"dots1": 32, "glm4_moe": 8, "llama": None, "mistral": 8, "mixtral": 8}
_KV_HEADS |= {"qwen2": 32, "qwen2_moe": 16, "qwen3": 32, "qwen3_moe": 4}
_WITH_ATTENTION_BIAS = ("dots1", "glm4_moe", "llama", "qwen3", "qwen3_moe")


def size(config: Mapping[str, Any], name: str) -> int:
    """Return a field that must be a positive integer.

    Raises:
        CheckpointError: it is of another type, or not positive.
        KeyError: it is missing.
    """
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the configuration's {name} is wrong: got {value!r}, expected a positive integer.")
    return value


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """Return a field that must be a number.

    Raises:
        CheckpointError: it is of another type.
    """
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"the configuration's {name} is wrong: got {value!r}, expected a number.")
    return float(value)


def kv_heads(config: Mapping[str, Any], family: str, heads: int) -> int:
    """Return the number of key and value heads."""
    found = config.get("num_key_value_heads", _KV_HEADS[family]) or heads
    return size({"num_key_value_heads": found}, "num_key_value_heads")


def attention_biases(config: Mapping[str, Any], family: str) -> tuple[bool, bool]:
    """Return whether the q, k and v projections have biases, and whether the output projection has one."""
    given = family in _WITH_ATTENTION_BIAS and bool(config.get("attention_bias") or False)
    if family == "qwen2_moe":
        return bool(config.get("qkv_bias", True)), False
    return family == "qwen2" or given, given and family != "glm4_moe"


def has_qk_norm(config: Mapping[str, Any], family: str) -> bool:
    """Return whether queries and keys are normalized."""
    return family in ("dots1", "qwen3", "qwen3_moe") or (family == "glm4_moe" and bool(config.get("use_qk_norm")))


def norm_eps(config: Mapping[str, Any], family: str) -> float:
    """Return the epsilon of the norms."""
    return number(config, "rms_norm_eps", 1e-5 if family in ("glm4_moe", "mixtral") else 1e-6)


def rope_fields(config: Mapping[str, Any], family: str) -> Mapping[str, Any]:
    """Return the configuration with the family's part of each head that is rotated, if the configuration omits it."""
    return {"partial_rotary_factor": 0.5, **config} if family == "glm4_moe" else config


def windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Return the sliding window of each layer; None for full attention.

    Raises:
        CheckpointError: a field is invalid.
    """
    if family in ("deepseek_v3", "glm4_moe", "llama"):
        return (None,) * layers
    if family.startswith("qwen") and not config.get("use_sliding_window", False):
        window = None
    else:
        window = config.get("sliding_window", None if family == "mixtral" else 4096)
    if window is not None:
        window = size({"sliding_window": window}, "sliding_window")
    if family in ("mistral", "mixtral", "qwen3_moe"):
        return (window,) * layers
    kinds = config.get("layer_types") or _layer_types(config, family, layers, window is not None)
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown or len(kinds) != layers:
        raise CheckpointError(
            f"the configuration's layer_types are wrong: got {len(kinds)} with {unknown or 'known names'}, expected "
            f"{layers} of full_attention and sliding_attention."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _layer_types(config: Mapping[str, Any], family: str, layers: int, windowed: bool) -> list[str]:
    """Return the layer types that the family's class fills in."""
    first = config.get("max_window_layers", 62 if family == "dots1" else 28)
    sliding = [i >= first for i in range(layers)]
    if family == "qwen2_moe":
        sliding = [i < first and i % 2 == 0 for i in range(layers)]
    return ["sliding_attention" if windowed and here else "full_attention" for here in sliding]
