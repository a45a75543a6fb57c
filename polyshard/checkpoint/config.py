"""The configuration of a model, read from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from polyshard.checkpoint.directory import find
from polyshard.config.file import MissingFieldError, check_fields
from polyshard.core.errors import CheckpointError


class ModelConfig(SimpleNamespace):
    """The fields of a config.json as attributes, without added defaults; `to_dict` returns them.

    Examples:
        >>> config = ModelConfig(model_type="llama", hidden_size=64)
        >>> config.hidden_size, config.to_dict()
        (64, {'model_type': 'llama', 'hidden_size': 64})
    """

    __slots__ = ("_file",)  # a slot is not part of vars(self), so not a field

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        file = getattr(self, "_file", "the configuration")
        raise MissingFieldError(f"{file} is incomplete: {name} is missing, but the model reads it. Add it.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return dict(vars(self))


def read_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` without running any code and without transformers.

    Args:
        directory: a Hugging Face model directory.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
        ConfigFileError: a key is not a valid field name, or a field that decoders share has a value of the wrong type.

    Examples:
        >>> _ = ps.save_config("model", {"model_type": "llama", "hidden_size": 64})
        >>> read_config("model").hidden_size
        64
    """
    path = find(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Pass a Hugging Face model directory.")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is invalid: got a {type(fields).__name__}, expected a JSON object")
    check_fields(fields, path)
    config = ModelConfig(**fields)
    object.__setattr__(config, "_file", path)
    return config
