"""Configurations that transformers does not know, for vLLM, which reads every config.json by transformers.

A config's class has to be importable by name in a worker before any plugin runs there: `config_class` makes one class
for each model type, and this module's `__getattr__` makes it again in the worker that unpickles it.
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

# What vLLM reads, and the names that it has elsewhere (nanoGPT's and torchtitan's among them).
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("padded_vocab_size",),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("block_size", "max_seq_len", "n_positions", "max_position"),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {"num_key_value_heads": ("n_kv_head", "n_kv_heads", "num_kv_heads")}
_PREFIX = "ConfigOf_"


class _AnyConfig(PretrainedConfig):
    """A config.json's own fields, and beside them those that vLLM reads, where they have another name."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does, after a look at what vLLM will read.

        Raises:
            RegistrationError: fields that it needs stand under no name that is known.
        """
        fields = dict(config_dict)
        for name, others in {**_NEEDED, **_OPTIONAL}.items():
            found = [other for other in others if fields.get(other) is not None]
            if fields.get(name) is None and found:
                fields[name] = fields[found[0]]
        missing = [f"{name} (or {', '.join(others)})" for name, others in _NEEDED.items() if fields.get(name) is None]
        if missing:
            raise RegistrationError(
                f"vLLM needs {'; '.join(missing)} in config.json, which has {sorted(config_dict)}: add them to the "
                "config that you save"
            )
        return super().from_dict(fields, **kwargs)


@cache
def config_class(model_type: str) -> type[PretrainedConfig]:
    """The class for a model type."""
    name = _PREFIX + model_type
    return type(name, (_AnyConfig,), {"model_type": model_type, "__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        return config_class(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def known_config(model_type: str) -> type[PretrainedConfig] | None:
    """The class that transformers itself has for a type."""
    try:
        known = CONFIG_MAPPING[model_type]
    except KeyError:
        return None
    return None if issubclass(known, _AnyConfig) else known


def register_config(model_type: str = MODEL_TYPE) -> None:
    """Make transformers of this process read config.json files of a type; again is as once.

    Raises:
        RegistrationError: transformers has a class of its own for it.
    """
    known = known_config(model_type)
    if known is not None:
        raise RegistrationError(
            f"model_type {model_type!r} is one that transformers knows ({known.__name__}): leave model_type out"
        )
    AutoConfig.register(model_type, config_class(model_type), exist_ok=True)


def fill_rotary_base(config: Any) -> None:
    """Give rotary parameters without a base the one that vLLM's own model of the family takes.

    A config class fills it in; `hf_overrides` of `rope_parameters` or `rope_scaling` replace what it filled in.

    Args:
        config: of a served model; changed in place.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return
    nested = [inner for inner in parameters.values() if isinstance(inner, dict)] or [parameters]
    for inner in nested:
        if inner.get("rope_theta") is None:
            inner["rope_theta"] = served_base(config.model_type)  # vLLM's models do not read config.rope_theta
