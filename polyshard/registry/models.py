"""The registered models: an environment variable, which child processes inherit, and an entry-point group."""

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
from polyshard.registry.live_module import ExistingModel
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
    """Make a model known to serving engines of this process and of all processes that it starts.

    Registering the same factory again does nothing; another one under the same name replaces it. Needs no serving
    engine to be installed.

    Args:
        name: the architecture: what stands in a config.json's `architectures`. The name of a model that the engine
            ships takes its place.
        factory: `(config, parallel_context) -> torch.nn.Module`: a function or class at the top level of an importable
            module or of the script, `module:attribute` or `file.py:attribute`, or a `functools.partial` of one with
            keyword arguments of plain JSON. Or a module that is there already: engines of this process that are started
            with `load_format="polyshard"` use its layers and its parameters' own memory, and no checkpoint.
        adapter: whose layers serve it: `"vllm"` for the engine's own, or another adapter's on the engine's groups.
        inputs: `"packed"`: forward takes token ids and positions `[tokens]`; `"batched"`: `[1, tokens]`, for a model
            that knows nothing of packing. Attention is the engine's in both.
        outputs: `"hidden"`: forward gives hidden states, and compute_logits makes logits of some; `"logits"`: forward
            gives logits of all tokens, which costs more.
        names: of weights in a checkpoint, made the model's own: `{regular expression: replacement}`, each applied in
            turn, or a function of a name.
        config_type: a dataclass: the factory is given one, filled from the config.json's fields.
        model_type: what stands in a config.json's `model_type`, where transformers does not know it. A config saved
            without one needs nothing.
        this_process: the factory may be a lambda, a closure or a bound object, and serves engines of this process.
        exact: serve in exact mode: log-probabilities are, bit for bit, those of a trainer with
            `initialize(..., exact=True)`. Whose layers hold the weights makes no difference to it.
        exact_shards: from how many partial products a row-parallel layer is summed: a multiple of the tensor-parallel
            sizes of trainer and engine, the same on both; default the engine's size.

    Raises:
        RegistrationError: the name or the factory will not do, or workers could not find it.
        AdapterError: no such adapter.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise RegistrationError(f"a model's name has to be an identifier, as in 'MyDecoder', got {name!r}")
    if adapter not in adapter_names():
        raise AdapterError(f"unknown adapter {adapter!r}; available: {', '.join(adapter_names())}")
    _check_choices(inputs, outputs)
    _check_exact(exact, exact_shards)
    arguments: dict[str, Any] = {}
    if isinstance(factory, nn.Module):
        if adapter != "vllm":
            raise RegistrationError(f"model {name!r} is a module with layers of its own: leave out adapter={adapter!r}")
        factory, adapter, this_process = ExistingModel(factory), "torch", True
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
    """What builds a registered model, with its further arguments.

    Raises:
        RegistrationError: it cannot be found in this process.
    """
    found = kept(model.reference) if is_kept(model.reference) else resolve(model.reference)
    build = functools.partial(found, **model.arguments) if model.arguments else found
    if model.config_type is None:
        return build
    config_type = resolve(model.config_type)
    return functools.wraps(found)(lambda config, context: build(typed_config(config, config_type), context))


def registered_models() -> dict[str, RegisteredModel]:
    """All registered models by name; the environment's take precedence over installed packages'.

    Raises:
        RegistrationError: the environment variable is malformed.
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
        raise RegistrationError(f"{ENVIRONMENT_VARIABLE} is no valid JSON ({error}); {expected}") from None
    if not isinstance(entries, dict):
        raise RegistrationError(f"{ENVIRONMENT_VARIABLE} holds a {type(entries).__name__}; {expected}")
    return {name: model_from_entry(name, entry, f"{ENVIRONMENT_VARIABLE}: {name!r}") for name, entry in entries.items()}


def model_from_entry(name: str, entry: Any, where: str) -> RegisteredModel:
    """A registered model from JSON: the reference of its factory, or an object with that and its options.

    Args:
        name: the architecture.
        entry: as `polyshard.core.serving.as_entry` gives it.
        where: it was read, for messages.

    Raises:
        RegistrationError: it is malformed.
    """
    fields = {"factory": entry} if isinstance(entry, str) else entry
    known = isinstance(fields, dict) and not set(fields) - {"factory", *OPTIONS}
    if not known or not isinstance(fields.get("factory"), str):
        raise RegistrationError(
            f'{where} is {entry!r}; expected "module:factory", or {{"factory": "module:factory"}} with any of '
            f"{', '.join(OPTIONS)}"
        )
    options: dict[str, Any] = {option: fields[option] for option in OPTIONS if option in fields}
    model = RegisteredModel(name=name, reference=fields["factory"], **options)
    try:
        _check_choices(model.inputs, model.outputs)
        _check_exact(model.exact, model.exact_shards)
    except RegistrationError as error:
        raise RegistrationError(f"{where}: {error}") from None
    if not isinstance(model.arguments, dict) or not isinstance(model.names, (dict, str)):
        raise RegistrationError(f"{where}: arguments is an object, names one or a string")
    return model


def _check_choices(inputs: str, outputs: str) -> None:
    for option, value, known in (("inputs", inputs, get_args(Inputs)), ("outputs", outputs, get_args(Outputs))):
        if value not in known:
            raise RegistrationError(f"{option} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _check_exact(exact: Any, shards: Any) -> None:
    if not isinstance(exact, bool):
        raise RegistrationError(f"exact must be true or false, got {exact!r}")
    if shards is None:
        return
    if not exact:
        raise RegistrationError(f"exact_shards={shards!r} belongs to exact mode: add exact=True")
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1:
        raise RegistrationError(f"exact_shards must be a positive integer, got {shards!r}")


def _dataclass_reference(name: str, config_type: type | str | None) -> str | None:
    if config_type is None:
        return None
    reference = _absolute(config_type) if isinstance(config_type, str) else reference_of(config_type)
    found = resolve(reference)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise RegistrationError(f"model {name!r}: config_type has to be a dataclass, got {found!r}")
    return reference


def _taken_apart(name: str, factory: Any) -> tuple[Any, dict[str, Any]]:
    """A partial's function and arguments; anything else as it is."""
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
            f"model {name!r}: a partial reaches a worker with keyword arguments of plain JSON alone, got "
            f"{factory.args} and {arguments}; put the rest into the config, or into a function of a module"
        )
    return inner, arguments


def _absolute(reference: str) -> str:
    """A file's reference with its full path: workers may run elsewhere."""
    module, _, attribute = reference.rpartition(":")
    return f"{Path(module).resolve()}:{attribute}" if module.endswith(".py") else reference
