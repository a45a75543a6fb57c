"""`polyshard serve`: vLLM's OpenAI-compatible server with a registered model."""

from __future__ import annotations

import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from polyshard.adapters.vllm import adapter as vllm_adapter
from polyshard.checkpoint import read_config
from polyshard.checkpoint.companions import has_tokenizer
from polyshard.checkpoint.location import as_path, is_remote
from polyshard.checkpoint.quantization.reading import refuse_stored_codes, refuse_unserved_method
from polyshard.cli.download import downloaded
from polyshard.config.fields import MODEL_TYPE
from polyshard.config.file import check_complete
from polyshard.core.errors import CheckpointError, RegistrationError
from polyshard.core.serving import as_entry
from polyshard.registry import model_from_entry, register_model, registered_models, resolve

SERVED_NAME = "PolyshardModel"
_SERVER = "vllm.entrypoints.openai.api_server"
# Options of vLLM that say how weights are read: then each tensor is checked when the worker reads it.
_LOADING = {"--quantization", "-q", "--hf-overrides", "--load-format"}


def serve(
    context: typer.Context,
    directory: Annotated[str, typer.Argument(help="A Hugging Face model directory, or its URL with --download.")],
    factory: Annotated[
        str | None, typer.Option(help="The model's factory: module:attribute or file.py:attribute.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter whose layers serve the model; vllm by default.")] = None,
    inputs: Annotated[str | None, typer.Option(help="Input layout of forward: packed (default) or batched.")] = None,
    outputs: Annotated[str | None, typer.Option(help="Output of forward: hidden (default) or logits.")] = None,
    names: Annotated[
        str | None,
        typer.Option(help='Renaming of checkpoint tensors: {"regular expression": "replacement"}, or module:function.'),
    ] = None,
    config_type: Annotated[str | None, typer.Option(help="module:Class of a dataclass that the factory takes.")] = None,
    exact: Annotated[bool, typer.Option(help="Serve in exact mode, bit for bit equal to an exact trainer.")] = False,
    exact_shards: Annotated[
        int | None, typer.Option(help="Shards of exact row-parallel sums; vLLM's tensor-parallel size by default.")
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Run the factory that the checkpoint's config.json names.")
    ] = False,
    download: Annotated[
        Path | None,
        typer.Option(help="Local directory for a checkpoint whose URL is given; kept, and used again if it is equal."),
    ] = None,
) -> None:
    """Serve DIRECTORY with vLLM's OpenAI-compatible server. All other options go to vLLM."""
    given = {
        "adapter": adapter,
        "inputs": inputs,
        "outputs": outputs,
        "names": names,
        "config_type": config_type,
        "exact": exact or None,
        "exact_shards": exact_shards,
    }
    chosen = {option: value for option, value in given.items() if value is not None}
    if download is not None:
        directory = str(downloaded(directory, download))
    command = server_command(directory, factory, trust_checkpoint, context.args, **chosen)
    if "--skip-tokenizer-init" in command and not _names_tokenizer(context.args):
        typer.secho(
            f"{directory} has no tokenizer: requests must pass token IDs as the prompt, with "
            '"return_token_ids": true and "detokenize": false to receive them. Pass --tokenizer to serve text.',
            err=True,
        )
    # In this process, which has imported most of what the server imports.
    sys.argv[:] = [_SERVER, *command[command.index(_SERVER) + 1 :]]
    runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)


def server_command(
    directory: str | Path, factory: str | None, trust_checkpoint: bool, arguments: list[str], **options: Any
) -> list[str]:
    """Register the model in this process's environment, and return the command that serves it.

    Args:
        directory: the model directory.
        factory: reference of the factory; by default that of the checkpoint if it is trusted, or of a registered model.
        trust_checkpoint: whether the factory that config.json names may run.
        arguments: options of vLLM.
        options: options of `register_model`; they override those in config.json.

    Raises:
        RegistrationError: there is no factory for the checkpoint, or an option is malformed.
        CheckpointError: the directory is a URL or has no config.json, or its weights are quantized without a
            quantization_config.
        ConfigFileError: a field of config.json is missing or invalid.
        MissingDependencyError: vLLM is not installed.
    """
    vllm_adapter.requirement.require()
    directory = as_path(directory)
    if is_remote(directory):
        raise CheckpointError(
            f"directory must be local: got {directory}. Pass --download with a directory for a copy, or copy it with "
            "polyshard.download_checkpoint."
        )
    config = read_config(directory)
    check_complete(config.to_dict(), directory / "config.json")
    if not _given(arguments) & _LOADING:
        refuse_unserved_method(directory)
        if getattr(config, "quantization_config", None) is None:
            refuse_stored_codes(directory)
    architectures = list(getattr(config, "architectures", None) or [])
    recorded = getattr(config, "polyshard", None) or {}
    if isinstance(options.get("names"), str) and options["names"].lstrip().startswith("{"):
        try:
            options["names"] = json.loads(options["names"])
        except ValueError as error:
            raise RegistrationError(f"--names {options['names']!r} is not valid JSON: {error}") from None
    command = [sys.executable, "-m", _SERVER, "--model", str(directory)]
    if not has_tokenizer(file.name for file in directory.glob("*")) and not _names_tokenizer(arguments):
        command.append("--skip-tokenizer-init")
    known = registered_models()
    arguments_of_factory: dict[str, Any] = {}
    if factory is None and recorded and trust_checkpoint:
        entry = as_entry(model_from_entry(SERVED_NAME, recorded, f"{directory}/config.json: polyshard"))
        factory, arguments_of_factory = entry.pop("factory"), entry.pop("arguments", {})
        options = {**entry, **options}
    if factory is not None:
        name = architectures[0] if architectures and architectures[0] in known else SERVED_NAME
        options.setdefault("model_type", _foreign_type(config))
        build = functools.partial(resolve(factory), **arguments_of_factory) if arguments_of_factory else factory
        register_model(name, build, **options)
        return [*command, "--hf-overrides", json.dumps({"architectures": [name]}), *arguments]
    if options:
        raise RegistrationError(
            f"{', '.join('--' + option.replace('_', '-') for option in options)} only apply to a model that this "
            "command registers. Pass --factory as well, or --trust-checkpoint."
        )
    if any(architecture in known for architecture in architectures):
        return [*command, *arguments]
    named = recorded.get("factory")
    hint = f" Its config.json names the factory {named!r}: pass --trust-checkpoint to run it." if named else ""
    raise RegistrationError(
        f"no model is registered for {directory}, whose architectures are {architectures}; registered: "
        f"{sorted(known) or 'none'}. Pass --factory module:attribute, or set POLYSHARD_MODELS.{hint}"
    )


def _given(arguments: list[str]) -> set[str]:
    return {argument.partition("=")[0].replace("_", "-") for argument in arguments}


def _names_tokenizer(arguments: list[str]) -> bool:
    return bool(
        _given(arguments) & {"--tokenizer", "--skip-tokenizer-init", "--no-skip-tokenizer-init", "--tokenizer-mode"}
    )


def _foreign_type(config: Any) -> str | None:
    """Return the model type if transformers has no class for it."""
    from polyshard.adapters.vllm.config import transformers_config

    model_type = getattr(config, "model_type", None)
    return None if not model_type or model_type == MODEL_TYPE or transformers_config(model_type) else model_type
