"""Default values of decoder families' config fields, as their Hugging Face config classes define them.

A trainer reads the fields of config.json, a server reads them through a config class with defaults. `complete_config`
gives both the same fields. Source: transformers 5, `configuration_llama.py` and the same file of the other families.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from polyshard.config.fields import config_fields
from polyshard.config.file import REQUIRED, check_complete
from polyshard.core.errors import ConfigurationError

_ALL = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_MISTRAL = {
    **_ALL,
    **{"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096},
}

# Defaults by model type, for the fields that the family's class has. Fields of other families have no effect.
OPTIONAL: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        **{**_ALL, **_NO_BIAS},
        **{"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    },
    "ministral": {**_MISTRAL, "layer_types": None},
    "mistral": _MISTRAL,
    "qwen2": {
        **{**_ALL, **_WINDOWS},
        **{"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
    },
    "qwen3": {
        **{**_ALL, **_WINDOWS, "attention_bias": False},
        **{"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    },
}
_ROTARY = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_STRETCHED = ("llama3", "yarn", "longrope")  # scalings that require the original number of positions
_BASE = 10_000.0

# Base that vLLM's own model uses if the rotary parameters (of `hf_overrides`) have none; 10000 for other models.
# Source: vLLM 0.32, `set_default_rope_theta` in vllm/model_executor/models.
SERVED_BASES: Mapping[str, float] = {
    "ernie4_5_moe": 500_000.0,
    "exaone4": 1_000_000.0,
    "exaone_moe": 1_000_000.0,
    "falcon_h1": 1e11,
    "qwen2": 1_000_000.0,
    "qwen3": 1_000_000.0,
}


def served_base(model_type: str | None) -> float:
    """Return the rotary base that vLLM's own model uses if the rotary parameters have none."""
    return SERVED_BASES.get(model_type or "", _BASE)


def complete_config(config: Any) -> SimpleNamespace:
    """Return the fields of a config, completed with the defaults of its family's Hugging Face class.

    The result is the same for the fields of a config.json (`polyshard.read_config`) and for the config object that a
    server holds. It has the fields in `REQUIRED`, those in `OPTIONAL` for every family, and

    - `rope_parameters`: a dict with `rope_type`, `rope_theta` and the scaling's own parameters;
    - `layer_windows`: one window, or None, for each layer.

    Args:
        config: a Hugging Face config, a `ModelConfig`, a mapping or an object with attributes. Its `model_type` must be
            one of `OPTIONAL`.

    Raises:
        ConfigurationError: the model type is unsupported, or a field is missing or has a value of the wrong type.

    Examples:
        >>> sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        >>> fields = {"model_type": "mistral", "num_attention_heads": 8, "rms_norm_eps": 1e-6, **sizes}
        >>> complete_config(fields).layer_windows
        (4096, 4096)
    """
    given = config_fields(config)
    model_type = getattr(config, "model_type", None) or given.get("model_type")
    filled = bool(getattr(type(config), "model_type", None))  # a config class has filled in its defaults
    if model_type == "mistral" and "layer_types" in given and not filled:
        model_type = "ministral"  # as transformers' AutoConfig reads such a file
    if model_type not in OPTIONAL:
        raise ConfigurationError(
            f"model_type is unsupported: got {model_type!r}, expected one of {', '.join(sorted(OPTIONAL))}. "
            "Read the fields of the config in your factory."
        )
    file = getattr(config, "_file", None)  # of `polyshard.read_config`
    if file is not None:
        check_complete({**given, "model_type": model_type}, file)
    missing = [name for name in REQUIRED if given.get(name) is None]
    if missing:
        raise ConfigurationError(
            f"the config of model_type {model_type!r} is incomplete: {', '.join(missing)} missing. Add them to "
            "config.json."
        )
    optional = OPTIONAL[model_type]
    fields: dict[str, Any] = {**{name: None for other in OPTIONAL.values() for name in other}, **_ALL, **_NO_BIAS}
    fields |= {name: given.get(name, default) for name, default in optional.items()}
    fields |= {name: given[name] for name in REQUIRED}
    heads = fields["num_attention_heads"]
    for name in (*REQUIRED[:-1], "max_position_embeddings", "sliding_window", "num_key_value_heads", "head_dim"):
        _check_size(name, fields[name], name in REQUIRED)
    for name in ("max_position_embeddings", "rms_norm_eps", "attention_dropout", *_SWITCHES):
        _check_kind(name, fields[name], name in optional or name in REQUIRED)
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // heads
    rope = _rotary({name: given.get(name) for name in _ROTARY}, fields["max_position_embeddings"], filled)
    rope.setdefault("rope_theta", served_base(model_type) if filled else _BASE)
    windows = _layer_windows(model_type, fields)
    return SimpleNamespace(model_type=model_type, **fields, rope_parameters=rope, layer_windows=windows)


def _check_kind(name: str, value: Any, known: bool) -> None:
    if not known:
        return
    switch = name in _SWITCHES
    if isinstance(value, bool) != switch or not isinstance(value, (int, float)):
        expected = "true or false" if switch else "a number"
        raise ConfigurationError(f"{name} is invalid: got {value!r}, expected {expected}. Correct config.json.")


def _check_size(name: str, value: Any, required: bool) -> None:
    if value is None and not required:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is invalid: got {value!r}, expected a positive integer. Correct config.json.")


def _rotary(given: Mapping[str, Any], positions: int, filled: bool) -> dict[str, Any]:
    """Return the rotary parameters in one dict, as in transformers 5; older files store them separately."""
    rope = (
        dict(given["rope_parameters"] or {})
        if filled
        else dict(given["rope_scaling"] or given["rope_parameters"] or {})
    )
    rope = {name: value for name, value in rope.items() if value is not None or name != "rope_theta"}
    nested = sorted(name for name, value in rope.items() if isinstance(value, Mapping))
    if nested:
        raise ConfigurationError(
            f"rope_parameters are unsupported: got parameters for each kind of layer ({', '.join(nested)}), expected "
            "one set for all. Read them in your factory."
        )
    if given["rope_theta"] is not None and not filled:
        rope.setdefault("rope_theta", given["rope_theta"])
    if given["partial_rotary_factor"] is not None:
        rope.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] in _STRETCHED:
        length = rope.setdefault("original_max_position_embeddings", positions)
        beside = given["original_max_position_embeddings"]
        if beside is not None and beside != length:
            raise ConfigurationError(
                f"original_max_position_embeddings is ambiguous: got {beside} beside the rotary parameters (which vLLM "
                f"uses) and {length} in them (which transformers uses). Set both to the same value in config.json."
            )
    return rope


def _layer_windows(model_type: str, fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers, types = fields["num_hidden_layers"], fields["layer_types"]
    has_switch = "use_sliding_window" in OPTIONAL[model_type]
    window = None if has_switch and not fields["use_sliding_window"] else fields["sliding_window"]
    if types is None:
        full = fields["max_window_layers"] if has_switch else 0
        return tuple(None if i < full else window for i in range(layers))
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if len(types) != layers or unknown or (window is None and "sliding_attention" in types):
        raise ConfigurationError(
            f"layer_types is invalid: got {types} with a window of {window}, expected full_attention or (with a "
            f"window) sliding_attention for each of {layers} layers. Correct config.json."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
