"""A serving engine that can take model factories, and the answers that a model owes it."""

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

INTERFACE = """a served model needs
    forward(input_ids, positions) -> hidden states
        input_ids and positions are int64 [tokens], hidden states [tokens, hidden size]
    compute_logits(hidden_states) -> logits
        [tokens, vocabulary], or this rank's shard of it as `polyshard.lm_head` gives it, as in
            def compute_logits(self, hidden_states):
                return self.lm_head(hidden_states)
        (none where it is registered with outputs="logits": then forward gives them)
and, for prompts given as embeddings, embed_input_ids(input_ids) -> [tokens, hidden size]
and a forward that takes inputs_embeds;
and, to leave what follows the last attention out for tokens that are not sampled,
    forward(..., finish: bool = True), which with finish=False ends after the last attention
    finish(x) -> hidden states, from what that gives for some of the tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """A model that serving engines know by name.

    Attributes:
        name: the architecture, as in a config.json's `architectures`.
        reference: `module:attribute` of the factory, by which another process finds it.
        adapter: whose layers serve it: `vllm` for vLLM's own, or another adapter's adopted onto vLLM's groups.
        arguments: further keyword arguments of the factory; plain JSON.
        inputs: what its forward takes: `packed` `[tokens]`, or `batched` `[1, tokens]`.
        outputs: what its forward gives: `hidden` states, or `logits`.
        names: from stored names to the model's: regular expressions, or `module:function`.
        config_type: `module:Class` of a dataclass that the factory takes, in place of the engine's config.
        model_type: of the config.json files that transformers has to be taught to read.
        exact: whether it is served in exact mode: by the operators, and with the bits, of a trainer in exact mode.
        exact_shards: of row-parallel sums in exact mode; None for the engine's tensor-parallel size.
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
    """Its fields as JSON, without its name; of the later ones those that are not the default."""
    plain = RegisteredModel(name=model.name, reference=model.reference)
    changed = {option: getattr(model, option) for option in OPTIONS if getattr(model, option) != getattr(plain, option)}
    return {"factory": model.reference, "adapter": model.adapter, **changed}


class ServingAdapter(Protocol):
    """An adapter whose library serves registered models.

    Attributes:
        name: of the adapter.
    """

    name: str

    @property
    def server_is_loaded(self) -> bool:
        """Whether the engine's library has been imported in this process: it may have looked for models already."""
        ...

    @property
    def server(self) -> ModelServer:
        """The engine; imports its library."""
        ...


@runtime_checkable
class ModelServer(Protocol):
    """A serving engine."""

    def register(self, model: RegisteredModel, factory: ModelFactory) -> None:
        """Make the engine of this process know `model`."""
        ...


def loaded_servers() -> Iterator[ModelServer]:
    """Yield the engines whose libraries this process has imported."""
    for adapter in installed_adapters():
        # Not by isinstance: before Python 3.12 it would evaluate `server`, which imports the engine.
        if getattr(adapter, "server_is_loaded", False):
            yield cast(ServingAdapter, adapter).server


def build_model(factory: ModelFactory, config: Any, parallel_context: ParallelContext, name: str) -> nn.Module:
    """Call a factory and check what it gives.

    Raises:
        RegistrationError: it raised (the cause is chained), or returned None or no module.
    """
    shown = describe(factory)
    try:
        model = factory(config, parallel_context)
    except Exception as error:
        raise RegistrationError(
            f"model {name!r}: its factory {shown} raised {type(error).__name__}: {error}"
        ) from error
    if model is None:
        raise RegistrationError(f"model {name!r}: its factory {shown} returned None; does it lack a return?")
    if not isinstance(model, nn.Module):
        raise RegistrationError(
            f"model {name!r}: its factory {shown} returned {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def check_served_interface(model: nn.Module, name: str, outputs: Outputs = "hidden") -> None:
    """Raise `RegistrationError`, naming what is missing, where a model cannot be served."""
    missing = []
    if outputs == "hidden" and not callable(getattr(model, "compute_logits", None)):
        missing.append("a method compute_logits(hidden_states)")
    try:
        inspect.signature(model.forward).bind(None, None)
    except TypeError as error:
        missing.append(f"a forward that takes (input_ids, positions): {error}")
    if outputs == "hidden" and forward_takes(model, "finish") and not callable(getattr(model, "finish", None)):
        missing.append("a method finish(x), which a forward with the argument finish has to have")
    if missing:
        raise RegistrationError(f"model {name!r} ({type(model).__name__}) lacks {' and '.join(missing)}; {INTERFACE}")


def forward_takes(model: nn.Module, argument: str) -> bool:
    """Whether its forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def describe(factory: Any) -> str:
    """`module:qualname` of a callable, for messages."""
    module = getattr(factory, "__module__", None) or type(factory).__module__
    qualname = getattr(factory, "__qualname__", None) or type(factory).__qualname__
    return f"{module}:{qualname}"


class EngineAttention(Protocol):
    """An attention module that can be taken over by an engine after it was built."""

    def serve_in(self, context: ParallelContext) -> None:
        """Attend by the cores of `context`, a `ParallelContext` with an attention factory, from now on."""
        ...
