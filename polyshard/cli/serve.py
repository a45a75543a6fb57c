"""`polyshard serve`: vLLM's OpenAI-compatible server with a registered model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from polyshard.adapters.vllm import adapter as vllm_adapter
from polyshard.checkpoint import read_config
from polyshard.core.config_fields import MODEL_TYPE
from polyshard.core.errors import RegistrationError
from polyshard.registry import register_model, registered_models

SERVED_NAME = "PolyshardModel"


def serve(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="A Hugging Face model directory.")],
    factory: Annotated[
        str | None, typer.Option(help="The model's factory: module:attribute or file.py:attribute.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Whose layers serve it: vllm, or torch adopted into it.")] = "vllm",
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Run the factory that the checkpoint's config.json names.")
    ] = False,
) -> None:
    """Serve DIRECTORY with vLLM's OpenAI-compatible server. All other options go to vLLM."""
    command = server_command(directory, factory, adapter, trust_checkpoint, context.args)
    os.execv(command[0], command)


def server_command(
    directory: Path, factory: str | None, adapter: str, trust_checkpoint: bool, options: list[str]
) -> list[str]:
    """Register the model in this process's environment, and give the command that serves it.

    Raises:
        RegistrationError: no factory is known for the checkpoint.
        CheckpointError: the directory has no config.json.
        MissingDependencyError: vLLM is not installed.
    """
    vllm_adapter.requirement.require()
    config = read_config(directory)
    architectures = list(getattr(config, "architectures", None) or [])
    recorded = (getattr(config, "polyshard", None) or {}).get("factory")
    if factory is None and recorded and trust_checkpoint:
        factory = recorded
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    if factory is not None:
        name = architectures[0] if architectures and _is_ours(architectures[0]) else SERVED_NAME
        register_model(name, factory, adapter=adapter, model_type=_foreign_type(config))
        return [*command, "--hf-overrides", json.dumps({"architectures": [name]}), *options]
    known = registered_models()
    if any(architecture in known for architecture in architectures):
        return [*command, *options]
    hint = f" Its config.json names the factory {recorded!r}: pass --trust-checkpoint to run it." if recorded else ""
    raise RegistrationError(
        f"no model is registered for {directory}, whose architectures are {architectures}; registered: "
        f"{sorted(known) or 'none'}. Pass --factory module:attribute, or set POLYSHARD_MODELS.{hint}"
    )


def _foreign_type(config: Any) -> str | None:
    """The model type, where transformers has no class for it."""
    from polyshard.adapters.vllm.config import known_config

    model_type = getattr(config, "model_type", None)
    return None if not model_type or model_type == MODEL_TYPE or known_config(model_type) else model_type


def _is_ours(architecture: str) -> bool:
    return architecture in registered_models()
