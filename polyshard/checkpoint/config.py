"""A model's configuration as its directory states it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from polyshard.checkpoint.directory import find
from polyshard.core.errors import CheckpointError


class ModelConfig(SimpleNamespace):
    """The fields of a config.json as attributes, nothing added; `to_dict` gives them back."""

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return dict(vars(self))


def read_config(directory: str | Path) -> ModelConfig:
    """Read `config.json`. No code is run, and transformers is not needed.

    Raises:
        CheckpointError: it is missing or is no JSON object.
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
    return ModelConfig(**fields)
