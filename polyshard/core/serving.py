"""Registered models, the interface that a served model must have, and the protocol of a server that runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, runtime_checkable

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.discovery import installed_adapters
from polyshard.core.errors import RegistrationError

ModelFactory = Callable[[Any, ParallelContext], nn.Module]

Inputs = Literal["packed", "batched"]
Outputs = Literal["hidden", "logits"]

OPTIONS = (
    "adapter",
    "arguments",
    "inputs",
    "outputs",
    "names",
    "config_type",
    "model_type",
    "exact",
    "exact_shards",
)

INTERFACE = """A served model needs these methods:
    forward(input_ids, positions) -> hidden states
        input_ids and positions are int64 [tokens], hidden states [tokens, hidden size]
    compute_logits(hidden_states) -> logits
        [tokens, vocabulary], or this rank's shard as returned by `polyshard.lm_head`, as in
            def compute_logits(self, hidden_states):
                return self.lm_head(hidden_states)
        (not needed if the model is registered with outputs="logits": forward then returns the logits)
For prompts that are given as embeddings it also needs
    embed_input_ids(input_ids) -> [tokens, hidden size], and an argument inputs_embeds of forward
To skip the layers after the last attention for tokens that are not sampled, it also needs
    forward(..., finish: bool = True), which with finish=False returns the input of these layers
    finish(x) -> hidden states, for the rows of that input that belong to sampled tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """A model that servers find by name.

    Attributes:
        name: the architecture, as in `architectures` of a config.json.
        reference: `module:attribute` of the factory, by which other processes import it.
        adapter: the adapter that builds the layers: `vllm`, or another one on vLLM's process groups.
        arguments: further keyword arguments of the factory; plain JSON.
        inputs: input shape of `forward`: `packed` `[tokens]`, or `batched` `[1, tokens]`.
        outputs: return value of `forward`: `hidden` states, or `logits`.
        names: mapping from checkpoint names to the model's: regular expressions, or a `module:function`.
        config_type: `module:Class` of a dataclass that the factory takes in place of the server's config.
        model_type: `model_type` of config.json files that is registered with transformers so that it can read them.
        exact: whether the model is served in exact mode, with the bits of a trainer in exact mode.
        exact_shards: number of partial products of row-parallel layers in exact mode; None for the server's
            tensor-parallel size.
    """

    name: str
    reference: str
    adapter: str = "vllm"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = "packed"
    outputs: Outputs = "hidden"
    names: Mapping[str, str] | str = field(default_factory=dict)
    config_type: str | None = None
    model_type: str | None = None
    exact: bool = False
    exact_shards: int | None = None


def as_entry(model: RegisteredModel) -> dict[str, Any]:
    """Return the fields as JSON values, without the name. Options with their default value are omitted."""
    plain = RegisteredModel(name=model.name, reference=model.reference)
    changed = {option: getattr(model, option) for option in OPTIONS if getattr(model, option) != getattr(plain, option)}
    return {"factory": model.reference, "adapter": model.adapter, **changed}


class ServingAdapter(Protocol):
    """An adapter whose library serves registered models.

    Attributes:
        name: the adapter's name.
    """

    name: str

    @property
    def server_is_loaded(self) -> bool:
        """Whether the server's library has been imported in this process, and may already have looked for models."""
        ...

    @property
    def server(self) -> ModelServer:
        """The server. Accessing it imports the library."""
        ...


@runtime_checkable
class ModelServer(Protocol):
    """A server that finds models by name."""

    def register(self, model: RegisteredModel, factory: ModelFactory) -> None:
        """Register `model` with the server's library in this process."""
        ...


def loaded_servers() -> Iterator[ModelServer]:
    """Yield the servers whose libraries this process has imported."""
    for adapter in installed_adapters():
        # isinstance would evaluate `server` before Python 3.12, which imports the library.
        if getattr(adapter, "server_is_loaded", False):
            yield cast(ServingAdapter, adapter).server


def build_model(factory: ModelFactory, config: Any, parallel_context: ParallelContext, name: str) -> nn.Module:
    """Call a factory and check that it returns a module.

    Args:
        factory: the model factory.
        config: its first argument.
        parallel_context: its second argument.
        name: the registered name, for messages.

    Raises:
        RegistrationError: the factory raised an exception (which is chained) or did not return a module.
    """
    shown = describe(factory)
    try:
        model = factory(config, parallel_context)
    except Exception as error:
        raise RegistrationError(
            f"The factory {shown} of model {name!r} raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        got = "None" if model is None else type(model).__name__
        advice = " Add a return statement." if model is None else ""
        raise RegistrationError(
            f"The factory {shown} of model {name!r} returned the wrong type: got {got}, expected a torch.nn.Module."
            f"{advice}"
        )
    return model


def check_served_interface(model: nn.Module, name: str, outputs: Outputs = "hidden") -> None:
    """Raise `RegistrationError`, with the missing methods, if a model cannot be served."""
    missing = []
    if outputs == "hidden" and not callable(getattr(model, "compute_logits", None)):
        missing.append("a method compute_logits(hidden_states)")
    try:
        inspect.signature(model.forward).bind(None, None)
    except TypeError as error:
        missing.append(f"a forward that takes (input_ids, positions): {error}")
    if outputs == "hidden" and forward_takes(model, "finish") and not callable(getattr(model, "finish", None)):
        missing.append("a method finish(x), which is required because forward has an argument finish")
    if missing:
        raise RegistrationError(
            f"Model {name!r} ({type(model).__name__}) cannot be served: missing {' and '.join(missing)}. {INTERFACE}"
        )


def forward_takes(model: nn.Module, argument: str) -> bool:
    """Return whether the model's `forward` has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def describe(factory: Any) -> str:
    """Return `module:qualname` of a callable, for messages."""
    module = getattr(factory, "__module__", None) or type(factory).__module__
    qualname = getattr(factory, "__qualname__", None) or type(factory).__qualname__
    return f"{module}:{qualname}"


class EngineAttention(Protocol):
    """An attention module that can be moved into a server after it was built."""

    def serve_in(self, context: ParallelContext) -> None:
        """Replace the attention core by the one that the attention factory of `context` builds."""
        ...
