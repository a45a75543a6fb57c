"""The registered models: an environment variable, which child processes inherit, and an entry-point group."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import AdapterError, RegistrationError
from polyshard.core.host import ModelFactory, RegisteredModel
from polyshard.registry.reference import reference_of, resolve

ENVIRONMENT_VARIABLE = "POLYSHARD_MODELS"  # JSON: {"Name": "module:factory"} or {"Name": {"factory":, "adapter":}}
ENTRY_POINT_GROUP = "polyshard.models"  # name = "module:factory"


def register_model(name: str, factory: ModelFactory | str, *, adapter: str = "vllm") -> RegisteredModel:
    """Make a model known to serving engines of this process and of all processes that it starts.

    Registering the same factory again does nothing; another one under the same name replaces it. Needs no serving
    engine to be installed.

    Args:
        name: the architecture: what stands in a config.json's `architectures`. The name of a model that the engine
            ships takes its place.
        factory: `(config, parallel_context) -> torch.nn.Module`, at the top level of an importable module or of the
            script; or `module:attribute` or `file.py:attribute`.
        adapter: whose layers serve it: `"vllm"` for the engine's own, or another adapter's on the engine's groups.

    Raises:
        RegistrationError: the name or the factory will not do, or workers could not find it.
        AdapterError: no such adapter.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise RegistrationError(f"a model's name has to be an identifier, as in 'MyDecoder', got {name!r}")
    if adapter not in adapter_names():
        raise AdapterError(f"unknown adapter {adapter!r}; available: {', '.join(adapter_names())}")
    if isinstance(factory, str):
        reference = _absolute(factory)
        factory = resolve(reference)
    else:
        reference = reference_of(factory)
    if not callable(factory):
        raise RegistrationError(
            f"model {name!r}: {reference} is a {type(factory).__name__}, expected a function (config, parallel_context)"
        )
    model = RegisteredModel(name=name, reference=reference, adapter=adapter)
    entries = _from_environment()
    entries[name] = model
    os.environ[ENVIRONMENT_VARIABLE] = json.dumps(
        {m.name: {"factory": m.reference, "adapter": m.adapter} for m in entries.values()}
    )
    if "vllm" in sys.modules:  # it may have run its plugins already
        load_adapter("vllm").host.register(model, factory)  # pyrefly: ignore  # a host is more than an Adapter
    return model


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
    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or "{}"
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
    models = {}
    for name, entry in entries.items():
        fields = {"factory": entry} if isinstance(entry, str) else entry
        if (
            not isinstance(fields, dict)
            or not isinstance(fields.get("factory"), str)
            or set(fields) - {"factory", "adapter"}
        ):
            raise RegistrationError(f"{ENVIRONMENT_VARIABLE}: {name!r} is {entry!r}; {expected}")
        models[name] = RegisteredModel(name=name, reference=fields["factory"], adapter=fields.get("adapter", "vllm"))
    return models


def _absolute(reference: str) -> str:
    """A file's reference with its full path: workers may run elsewhere."""
    module, _, attribute = reference.rpartition(":")
    return f"{Path(module).resolve()}:{attribute}" if module.endswith(".py") else reference
