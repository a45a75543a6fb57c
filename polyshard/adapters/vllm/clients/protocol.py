"""What polyshard asks of an engine, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from polyshard.core.errors import ConfigurationError

BACKEND = "polyshard"  # the name of the weight transfer backend

ABORTED = "abort"


class Client(Protocol):
    """The calls that a weight sync makes to an engine.

    An engine that cannot be reached, or that has died, raises `ConnectionError`.

    Attributes:
        name: the engine's name, for messages.
        host: host name or address of the engine's machine.
    """

    name: str
    host: str

    def call(self, method: str, payload: Mapping[str, Any] | None) -> None:
        """Call one of vLLM's weight-transfer methods on every worker, and wait for it."""
        ...

    def unfinished(self) -> list[str]:
        """Return the IDs of the unfinished requests that this client knows of."""
        ...

    def abort(self, requests: list[str]) -> None:
        """Abort requests; calls of `generate` that wait for them return what they have."""
        ...

    def forget_cached(self, version: str) -> bool:
        """Reset the prefix cache, and set the engine's weight version; return False if requests are unfinished."""
        ...


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A request for one completion.

    Attributes:
        id: an ID that no other request has.
        prompt: token IDs.
        sampling: arguments of `vllm.SamplingParams`.
        routing_from: the first token of which the answer contains the experts; None for an answer without experts.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    routing_from: int | None = None


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """A completion, or the part of it that was sampled before the request was aborted.

    Attributes:
        tokens: sampled token IDs, including the stop token.
        logprobs: log-probability of each sampled token.
        versions: version of the weights that sampled each token.
        reason: `stop`, `length`, or `abort`.
        routing: the experts that the tokens from `routing_from` to the last but one took, int64
            `[tokens, experts per token]` by layer; None if they were not requested, or no token was sampled.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[str, ...]
    reason: str
    routing: Mapping[str, torch.Tensor] | None = None


class RolloutClient(Client, Protocol):
    """A client that samples, too. Its methods are called from several threads."""

    def generate(self, request: SampleRequest) -> SampleAnswer:
        """Sample one completion, and wait for it."""
        ...

    def is_reachable(self) -> bool:
        """Whether the engine answers, within seconds."""
        ...


def is_client(engine: Any) -> bool:
    """Whether an object has the methods of a `Client`."""
    return hasattr(engine, "call") and hasattr(engine, "forget_cached")


def listed_engines(engines: Any, *, only_clients: bool = False) -> list[Any]:
    """Return one engine, or several, as a list.

    Args:
        engines: clients or `vllm.LLM` objects.
        only_clients: whether to refuse the latter.

    Raises:
        ConfigurationError: one is something else, such as a URL.
    """
    found = list(engines) if isinstance(engines, (list, tuple)) else [engines]
    for engine in found:
        if not is_client(engine) and (only_clients or not hasattr(engine, "llm_engine")):
            others = "" if only_clients else ", or a vllm.LLM object"
            raise ConfigurationError(
                f"an engine is invalid: got {engine!r}, expected ps.HttpClient(URL), ps.ray_engine(...) or "
                f"ps.LlmClient(llm){others}."
            )
    return found


def token_versions(count: int, spans: Sequence[Any] | None, version: str) -> tuple[str, ...]:
    """Return the weight version of each sampled token.

    Args:
        count: number of sampled tokens.
        spans: vLLM's spans of tokens with `version`, `start` and `end`, as objects or as JSON; it gives them for
            finished completions.
        version: version of the tokens that no span covers.
    """
    versions = [version] * count
    for span in spans or ():
        fields: Mapping[str, Any] = span if isinstance(span, Mapping) else vars(span)
        start, end = fields["start"], min(fields["end"], count)
        versions[start:end] = [fields["version"]] * (end - start)
    return tuple(versions)
