"""The registered models, stored in an environment variable that child processes inherit and in entry points."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

from torch import nn

from polyshard.config.fields import typed_config
from polyshard.core.discovery import adapter_names
from polyshard.core.environment import MODELS
from polyshard.core.errors import AdapterError, RegistrationError
from polyshard.core.serving import OPTIONS, Inputs, ModelFactory, Outputs, RegisteredModel, as_entry, loaded_servers
from polyshard.registry.in_process import is_kept, keep, kept
from polyshard.registry.live_module import LiveModel
from polyshard.registry.names import NameMap, check_names
from polyshard.registry.reference import reference_of, resolve

ENVIRONMENT_VARIABLE = MODELS.name
ENTRY_POINT_GROUP = "polyshard.models"  # name = "module:factory"


def register_model(
    name: str,
    factory: ModelFactory | nn.Module | str,
    *,
    adapter: str = "vllm",
    inputs: Inputs = "packed",
    outputs: Outputs = "hidden",
    names: NameMap | None = None,
    config_type: type | str | None = None,
    model_type: str | None = None,
    this_process: bool = False,
    exact: bool = False,
    exact_shards: int | None = None,
) -> RegisteredModel:
    """Make a model available to serving engines of this process and of all its child processes.

    The call is idempotent; another factory under the same name replaces the first. No server has to be installed.

    Args:
        name: the architecture, as in `architectures` of config.json. It takes precedence over a model of the same name
            that the engine ships.
        factory: `(config, parallel_context) -> torch.nn.Module`: a function or class at the top level of an importable
            module or of the script, `module:attribute` or `file.py:attribute`, or a `functools.partial` of one with
            keyword arguments of plain JSON. Or a live module: engines of this process that are started with
            `load_format="polyshard"` use its layers and its parameters' memory, and no checkpoint.
        adapter: adapter whose layers serve the model: `"vllm"` for the engine's own layers, or another adapter, which
            uses the engine's process groups.
        inputs: `"packed"` if forward takes token IDs and positions as `[tokens]`; `"batched"` for `[1, tokens]`, for a
            model that does not support packing. Attention is the engine's in both cases.
        outputs: `"hidden"` if forward returns hidden states, from which compute_logits computes logits of selected
            tokens; `"logits"` if forward returns logits of all tokens, which is more expensive.
        names: conversion of checkpoint names to the model's own: `{regular expression: replacement}`, applied in order,
            or a function of a name.
        config_type: a dataclass that is filled from the fields of config.json and passed to the factory.
        model_type: `model_type` of config.json, if transformers does not know it. Not needed for a config saved without
            a model_type.
        this_process: allow a lambda, a closure or a bound object as the factory, for engines of this process.
        exact: serve in exact mode: log-probabilities equal, bit for bit, those of a trainer with
            `initialize(..., exact=True)`, whichever adapter's layers hold the weights.
        exact_shards: number of partial products that a row-parallel layer is summed from: a multiple of the
            tensor-parallel sizes of trainer and engine, equal on both; the engine's size by default.

    Raises:
        RegistrationError: the name or the factory is invalid, or workers could not find the factory.
        AdapterError: there is no such adapter.

    Examples:
        >>> model = register_model("TinyModel", "polyshard.proof.small_model:build_model")
        >>> model.reference, model.adapter
        ('polyshard.proof.small_model:build_model', 'vllm')
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise RegistrationError(f"the model's name is invalid: got {name!r}, expected an identifier like 'MyDecoder'")
    if adapter not in adapter_names():
        raise AdapterError(f"unknown adapter {adapter!r}; available: {', '.join(adapter_names())}")
    _check_choices(inputs, outputs)
    _check_exact(exact, exact_shards)
    arguments: dict[str, Any] = {}
    if isinstance(factory, nn.Module):
        if adapter != "vllm":
            raise RegistrationError(f"model {name!r} is a module with its own layers: remove adapter={adapter!r}")
        factory, adapter, this_process = LiveModel(factory), "torch", True
    if isinstance(factory, str):
        reference = _absolute(factory)
        factory = resolve(reference)
    elif this_process:
        reference = keep(name, factory)
    else:
        factory, arguments = _taken_apart(name, factory)
        reference = reference_of(factory)
    if not callable(factory):
        raise RegistrationError(
            f"model {name!r}: {reference} is a {type(factory).__name__}, expected a function (config, parallel_context)"
        )
    model = RegisteredModel(
        name=name,
        reference=reference,
        adapter=adapter,
        arguments=arguments,
        inputs=inputs,
        outputs=outputs,
        names={} if names is None else check_names(names),
        config_type=_dataclass_reference(name, config_type),
        model_type=model_type,
        exact=exact,
        exact_shards=exact_shards,
    )
    entries = _from_environment()
    for server in loaded_servers():  # each may have looked for models already
        server.register(model, factory_of(model))
    entries[name] = model
    os.environ[ENVIRONMENT_VARIABLE] = json.dumps({m.name: as_entry(m) for m in entries.values()})
    return model


def factory_of(model: RegisteredModel) -> ModelFactory:
    """Return the factory of a registered model, with its extra arguments bound.

    Raises:
        RegistrationError: the factory cannot be found in this process.

    Examples:
        >>> model = register_model("TinyModel", "polyshard.proof.small_model:build_model")
        >>> factory_of(model).__name__
        'build_model'
    """
    found = kept(model.reference) if is_kept(model.reference) else resolve(model.reference)
    build = functools.partial(found, **model.arguments) if model.arguments else found
    if model.config_type is None:
        return build
    config_type = resolve(model.config_type)
    return functools.wraps(found)(lambda config, context: build(typed_config(config, config_type), context))


def registered_models() -> dict[str, RegisteredModel]:
    """Return all registered models by name. The environment variable takes precedence over installed packages.

    Raises:
        RegistrationError: the environment variable is malformed.

    Examples:
        >>> _ = ps.register_model("TinyModel", "polyshard.proof.small_model:build_model")
        >>> "TinyModel" in registered_models()
        True
    """
    found = {
        point.name: RegisteredModel(name=point.name, reference=point.value)
        for point in entry_points(group=ENTRY_POINT_GROUP)
    }
    return {**found, **_from_environment()}


def _from_environment() -> dict[str, RegisteredModel]:
    text = (MODELS.read() or "").strip() or "{}"
    expected = (
        'expected JSON like {"MyDecoder": "module:factory"} or '
        '{"MyDecoder": {"factory": "module:factory", "adapter": "torch"}}'
    )
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise RegistrationError(f"{ENVIRONMENT_VARIABLE} is not valid JSON ({error}); {expected}") from None
    if not isinstance(entries, dict):
        raise RegistrationError(f"{ENVIRONMENT_VARIABLE} is invalid: got a {type(entries).__name__}; {expected}")
    return {name: model_from_entry(name, entry, f"{ENVIRONMENT_VARIABLE}: {name!r}") for name, entry in entries.items()}


def model_from_entry(name: str, entry: Any, where: str) -> RegisteredModel:
    """Return a registered model from its JSON form: the factory's reference, or an object with reference and options.

    Args:
        name: the architecture.
        entry: as returned by `polyshard.core.serving.as_entry`.
        where: the origin of the entry, for messages.

    Raises:
        RegistrationError: the entry is malformed.

    Examples:
        >>> model_from_entry("TinyModel", {"factory": "decoder:build_model", "outputs": "logits"}, "a test").outputs
        'logits'
    """
    fields = {"factory": entry} if isinstance(entry, str) else entry
    known = isinstance(fields, dict) and not set(fields) - {"factory", *OPTIONS}
    if not known or not isinstance(fields.get("factory"), str):
        raise RegistrationError(
            f'{where} is invalid: got {entry!r}, expected "module:factory", or {{"factory": "module:factory"}} with '
            f"any of {', '.join(OPTIONS)}"
        )
    options: dict[str, Any] = {option: fields[option] for option in OPTIONS if option in fields}
    model = RegisteredModel(name=name, reference=fields["factory"], **options)
    try:
        _check_choices(model.inputs, model.outputs)
        _check_exact(model.exact, model.exact_shards)
    except RegistrationError as error:
        raise RegistrationError(f"{where}: {error}") from None
    if not isinstance(model.arguments, dict) or not isinstance(model.names, (dict, str)):
        raise RegistrationError(f"{where}: expected arguments to be an object, and names to be an object or a string")
    return model


def _check_choices(inputs: str, outputs: str) -> None:
    for option, value, known in (("inputs", inputs, get_args(Inputs)), ("outputs", outputs, get_args(Outputs))):
        if value not in known:
            raise RegistrationError(f"{option} is invalid: got {value!r}, expected {' or '.join(map(repr, known))}")


def _check_exact(exact: Any, shards: Any) -> None:
    if not isinstance(exact, bool):
        raise RegistrationError(f"exact is invalid: got {exact!r}, expected true or false")
    if shards is None:
        return
    if not exact:
        raise RegistrationError(f"exact_shards={shards!r} requires exact mode. Add exact=True.")
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
        raise RegistrationError(f"exact_shards is invalid: got {shards!r}, expected a positive integer")


def _dataclass_reference(name: str, config_type: type | str | None) -> str | None:
    if config_type is None:
        return None
    reference = _absolute(config_type) if isinstance(config_type, str) else reference_of(config_type)
    found = resolve(reference)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise RegistrationError(f"model {name!r}: config_type is invalid: got {found!r}, expected a dataclass")
    return reference


def _taken_apart(name: str, factory: Any) -> tuple[Any, dict[str, Any]]:
    """Split a partial into its function and keyword arguments; return other factories unchanged."""
    if not isinstance(factory, functools.partial):
        return factory, {}
    inner, arguments = _taken_apart(name, factory.func)
    arguments = {**arguments, **factory.keywords}
    try:
        travelled = json.loads(json.dumps(arguments))
    except (TypeError, ValueError):
        travelled = None
    if factory.args or travelled != arguments:
        raise RegistrationError(
            f"model {name!r}: a partial can only be sent to a worker with keyword arguments of plain JSON, got "
            f"{factory.args} and {arguments}. Put the rest into the config, or into a function of a module."
        )
    return inner, arguments


def _absolute(reference: str) -> str:
    """Return a reference with an absolute file path, because workers may run in another directory."""
    module, _, attribute = reference.rpartition(":")
    return f"{Path(module).resolve()}:{attribute}" if module.endswith(".py") else reference
