"""A model's configuration as plain fields, whatever holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from polyshard.core.errors import ConfigurationError

MODEL_TYPE = "polyshard"  # in a config.json that names none; servers are taught to read it


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config object; mappings inside become dicts.

    Args:
        config: a Hugging Face config, a mapping, a dataclass, a named tuple, a pydantic model, or an object with
            attributes, those of its class included.

    Raises:
        ConfigurationError: it is none of these.

    Example:
        >>> config_fields({"model_type": "llama", "num_hidden_layers": 2})
        {'model_type': 'llama', 'num_hidden_layers': 2}
    """
    fields = None if isinstance(config, type) else _fields(config)
    if fields is None:
        raise ConfigurationError(
            f"the config is no set of fields: got {config!r}, expected a Hugging Face config, a dataclass, a dict, or "
            "an object with attributes. Pass one of these"
        )
    model_type = None if isinstance(config, Mapping) else getattr(config, "model_type", None)
    if not fields.get("model_type") and isinstance(model_type, str) and model_type:
        fields["model_type"] = model_type  # an attribute of the class
    return _plain(fields)


def _fields(config: Any) -> dict[str, Any] | None:
    if isinstance(config, Mapping):
        return dict(config)
    for method in ("to_dict", "model_dump", "_asdict"):  # before dataclasses, which transformers' configs are, too
        own = getattr(config, method, None)
        if callable(own):
            return dict(own())
    if dataclasses.is_dataclass(config):
        return dataclasses.asdict(config)
    if hasattr(config, "__dict__") or hasattr(config, "__slots__"):
        return _attributes(config)
    return None


def _attributes(config: Any) -> dict[str, Any]:
    """Attributes of an object and of its classes, without methods and what begins with an underscore."""
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
    """A dataclass filled from a config's attributes; fields that it lacks take their defaults.

    Raises:
        ConfigurationError: `config_type` is no dataclass, or fields without a default are missing.
    """
    if not (isinstance(config_type, type) and dataclasses.is_dataclass(config_type)):
        raise ConfigurationError(f"config_type has to be a dataclass, got {config_type!r}")
    wanted = [field for field in dataclasses.fields(config_type) if field.init]
    given = {field.name: getattr(config, field.name) for field in wanted if hasattr(config, field.name)}
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [f.name for f in wanted if f.name not in given and (f.default, f.default_factory) == absent]
    if missing:
        raise ConfigurationError(f"{config_type.__name__} needs {', '.join(missing)}, which the config has not")
    return config_type(**given)
