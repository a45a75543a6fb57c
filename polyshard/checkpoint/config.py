"""A model's configuration as its directory states it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from polyshard.checkpoint.directory import find
from polyshard.config.file import MissingFieldError, check_fields
from polyshard.core.errors import CheckpointError


class ModelConfig(SimpleNamespace):
    """The fields of a config.json as attributes, nothing added; `to_dict` gives them back."""

    __slots__ = ("_file",)  # a slot is none of the fields

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        file = getattr(self, "_file", "the configuration")
        raise MissingFieldError(f"{file} is incomplete: {name} is missing, which the model reads. Add it.")

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return dict(vars(self))


def read_config(directory: str | Path) -> ModelConfig:
    """Read `config.json`. No code is run, and transformers is not needed.

    Raises:
        CheckpointError: it is missing or is no JSON object.
        ConfigFileError: a key is no field, or a field that decoders share has a value of another kind.
    """
    path = find(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: expected a Hugging Face model directory")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds a {type(fields).__name__}, expected a JSON object")
    check_fields(fields, path)
    config = ModelConfig(**fields)
    object.__setattr__(config, "_file", path)
    return config
