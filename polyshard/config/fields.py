"""Conversion of configuration objects to plain fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from polyshard.core.errors import ConfigurationError

MODEL_TYPE = "polyshard"  # written to a config.json that has no model_type; servers learn to read it


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config object as a dict; nested mappings become dicts.

    Args:
        config: a Hugging Face config, a mapping, a dataclass, a named tuple, a pydantic model, or an object with
            attributes, including those of its class.

    Raises:
        ConfigurationError: the config is none of these.

    Examples:
        >>> config_fields({"model_type": "llama", "num_hidden_layers": 2})
        {'model_type': 'llama', 'num_hidden_layers': 2}
    """
    fields = None if isinstance(config, type) else _fields(config)
    if fields is None:
        raise ConfigurationError(
            f"the config has no fields: got {config!r}, expected a Hugging Face config, a dataclass, a dict, or an "
            "object with attributes."
        )
    model_type = None if isinstance(config, Mapping) else getattr(config, "model_type", None)
    if not fields.get("model_type") and isinstance(model_type, str) and model_type:
        fields["model_type"] = model_type  # a class attribute
    return _plain(fields)


def _fields(config: Any) -> dict[str, Any] | None:
    if isinstance(config, Mapping):
        return dict(config)
    for method in ("to_dict", "model_dump", "_asdict"):  # before dataclasses, which transformers' configs also are
        own = getattr(config, method, None)
        if callable(own):
            return dict(own())
    if dataclasses.is_dataclass(config):
        return dataclasses.asdict(config)
    if hasattr(config, "__dict__") or hasattr(config, "__slots__"):
        return _attributes(config)
    return None


def _attributes(config: Any) -> dict[str, Any]:
    """Return the attributes of an object and of its classes, without methods and names with a leading underscore."""
    classes = [kind for kind in reversed(type(config).__mro__) if kind is not object]
    names = [name for kind in classes for name in vars(kind)] + list(getattr(config, "__dict__", {}))
    found = {}
    for name in names:
        value = None if name.startswith("_") else getattr(config, name, None)
        if not name.startswith("_") and not callable(value) and hasattr(config, name):
            found[name] = value
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def typed_config(config: Any, config_type: type) -> Any:
    """Return a dataclass filled from a config's attributes; fields that the config does not define take their defaults.

    Raises:
        ConfigurationError: `config_type` is not a dataclass, or fields without a default are missing.

    Examples:
        >>> Sizes = dataclasses.make_dataclass("Sizes", [("hidden_size", int)])
        >>> typed_config(ps.ModelConfig(hidden_size=64, vocab_size=96), Sizes)
        Sizes(hidden_size=64)
    """
    if not (isinstance(config_type, type) and dataclasses.is_dataclass(config_type)):
        raise ConfigurationError(f"config_type is invalid: got {config_type!r}, expected a dataclass.")
    wanted = [field for field in dataclasses.fields(config_type) if field.init]
    given = {field.name: getattr(config, field.name) for field in wanted if hasattr(config, field.name)}
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [f.name for f in wanted if f.name not in given and (f.default, f.default_factory) == absent]
    if missing:
        raise ConfigurationError(f"{config_type.__name__} needs {', '.join(missing)}, which the config does not define")
    return config_type(**given)
