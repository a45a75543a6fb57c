"""A model's configuration as plain fields, whatever holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from polyshard.core.errors import ConfigurationError

MODEL_TYPE = "polyshard"  # in a config.json that names none; servers are taught to read it


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of a Hugging Face config, a dataclass, a mapping, or an object with attributes.

    Raises:
        ConfigurationError: it is none of these.
    """
    if isinstance(config, Mapping):
        return dict(config)
    to_dict = getattr(config, "to_dict", None)  # first: transformers' config classes are dataclasses, and hold more
    if callable(to_dict) and not isinstance(config, type):
        return dict(to_dict())
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    if hasattr(config, "__dict__") and not isinstance(config, type):
        return dict(vars(config))
    raise ConfigurationError(
        f"a config is a Hugging Face config, a dataclass, a dict, or an object with attributes, got {config!r}"
    )


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
