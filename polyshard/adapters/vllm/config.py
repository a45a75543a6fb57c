"""Config classes for model types that transformers does not define: vLLM reads every config.json with transformers.

A worker must be able to import a config's class by name before any plugin runs there. `config_class` creates one class
per model type, and this module's `__getattr__` recreates it in the worker that unpickles it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from polyshard.config.families import served_base
from polyshard.config.fields import MODEL_TYPE
from polyshard.core.errors import RegistrationError

# Fields that vLLM reads, with the names that other projects (nanoGPT, torchtitan) give them.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("padded_vocab_size",),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("block_size", "max_seq_len", "n_positions", "max_position"),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {"num_key_value_heads": ("n_kv_head", "n_kv_heads", "num_kv_heads")}
_PREFIX = "ConfigOf_"


class _AnyConfig(PretrainedConfig):
    """The fields of a config.json, and copies of those that vLLM reads under a different name."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create the config as transformers does, after adding the field names that vLLM reads.

        Raises:
            RegistrationError: a required field is missing under all known names.
        """
        fields = dict(config_dict)
        for name, others in {**_REQUIRED, **_OPTIONAL}.items():
            given = [other for other in others if fields.get(other) is not None]
            if fields.get(name) is None and given:
                fields[name] = fields[given[0]]
        missing = [f"{name} (or {', '.join(others)})" for name, others in _REQUIRED.items() if fields.get(name) is None]
        if missing:
            raise RegistrationError(
                f"vLLM needs {'; '.join(missing)} in config.json: got {sorted(config_dict)}. Add the missing fields to "
                "the config that you save"
            )
        return super().from_dict(fields, **kwargs)


@cache
def config_class(model_type: str) -> type[PretrainedConfig]:
    """Return the config class of a model type."""
    name = _PREFIX + model_type
    return type(name, (_AnyConfig,), {"model_type": model_type, "__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        return config_class(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def transformers_config(model_type: str) -> type[PretrainedConfig] | None:
    """Return the class that transformers itself defines for a model type; None if there is none."""
    try:
        known = CONFIG_MAPPING[model_type]
    except KeyError:
        return None
    return None if issubclass(known, _AnyConfig) else known


def register_config(model_type: str = MODEL_TYPE) -> None:
    """Make transformers in this process read config.json files of a model type. Idempotent.

    Raises:
        RegistrationError: transformers defines a class for this type itself.
    """
    known = transformers_config(model_type)
    if known is not None:
        raise RegistrationError(
            f"model_type {model_type!r} is already defined by transformers ({known.__name__}). Remove model_type"
        )
    AutoConfig.register(model_type, config_class(model_type), exist_ok=True)


def fill_rotary_base(config: Any) -> None:
    """Add the rotary base that vLLM's model of the family uses to rotary parameters that lack one.

    A config class fills it in, but `hf_overrides` of `rope_parameters` or `rope_scaling` replace those values.

    Args:
        config: the config of a served model; changed in place.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return
    nested = [inner for inner in parameters.values() if isinstance(inner, dict)] or [parameters]
    for inner in nested:
        if inner.get("rope_theta") is None:
            inner["rope_theta"] = served_base(config.model_type)  # vLLM's models do not read config.rope_theta
