"""The experts that layers replay and record in each micro-batch of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.model_weights import gather_over
from polyshard.experts.observed import expert_layers, in_backward


@dataclass(frozen=True, slots=True)
class GivenExperts:
    """The experts that one layer replays.

    Attributes:
        experts: int64 `[tokens, experts per token]` of each micro-batch.
        names: the layers of which experts are given, also those of other pipeline stages.
    """

    experts: tuple[torch.Tensor, ...]
    names: frozenset[str]

    @property
    def outside_of_steps(self) -> torch.Tensor | None:
        """The experts of a forward pass that no step runs; None if several are given."""
        return self.experts[0] if len(self.experts) == 1 else None


class StepRouting:
    """What the layers of a model replay and record in one step's micro-batches.

    Args:
        model: the model, or this rank's pipeline stages.
        fit: from the experts of a micro-batch and its index to those of its padded tokens.

    Attributes:
        replays: whether a layer replays experts.
    """

    def __init__(
        self, model: nn.Module, fit: Callable[[torch.Tensor, int], torch.Tensor] = lambda experts, index: experts
    ) -> None:
        self._all = list(expert_layers(model))
        self._layers = [layer for _, layer in self._all if layer.given is not None or layer.records]
        self._fit = fit
        self.replays = any(layer.given is not None for layer in self._layers)
        for layer in self._layers:
            layer.recorded_in_step = {}

    def check(self, count: int) -> None:
        """Raise `ConfigurationError` unless experts are given for as many micro-batches as there are."""
        problem = self._wrong_count(count)
        if problem is not None:
            raise ConfigurationError(problem)

    def check_over_pipeline(self, tokens: Sequence[Sequence[int]], context: ParallelContext) -> None:
        """Raise `ConfigurationError` on all ranks of a pipeline unless the experts fit their stages. A collective.

        Args:
            tokens: the numbers of tokens that experts may be given for, of each micro-batch, the first of all tokens.
            context: the parallel context.
        """
        names = frozenset().union(*(layer.given.names for layer in self._layers if layer.given is not None))
        problem = self._wrong_count(len(tokens)) or self._wrong_tokens(tokens)
        axis = context.axis("pipeline")
        with context.guard("pipeline routing"):
            told = gather_over(axis, (problem, sorted(names), [name for name, _ in self._all], self.replays))
        for rank, (text, *_) in zip(axis.ranks, told):
            if text is not None:
                raise ConfigurationError(f"{text} (rank {rank})")
        unknown = {name for _, given, _, _ in told for name in given} - {name for _, _, own, _ in told for name in own}
        if unknown:
            raise ConfigurationError(
                f"the replayed experts do not fit the model: unexpected {sorted(unknown)}, which no pipeline stage "
                "has. Record them with the same model."
            )
        without = [rank for rank, (_, _, own, replays) in zip(axis.ranks, told) if own and not replays]
        if without:
            raise ConfigurationError(
                f"experts are replayed on some ranks of a pipeline only: not on {without} of {list(axis.ranks)}. Enter "
                "ps.replay_routing on all of them."
            )

    def select(self, index: int) -> None:
        """Let the next forward pass, or its recomputation in a backward pass, take the experts of a micro-batch."""
        for layer in self._layers:
            if layer.given is not None:
                layer.replay = layer.replayed_last = self._fit(layer.given.experts[index], index)

    def collect(self, index: int) -> None:
        """Keep what the forward pass of a micro-batch has recorded; padding is left out."""
        for layer in self._layers:
            if layer.recorded is not None:
                counted = layer.observed.counted
                layer.recorded_in_step[index] = layer.recorded if counted is None else layer.recorded[counted]
                layer.recorded = None

    def end(self) -> None:
        """Return to forward passes that no step runs."""
        for layer in self._layers:
            layer.replay = None if layer.given is None else layer.given.outside_of_steps
            layer.recorded = None

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[None]:
        """Run the forward and backward pass of a micro-batch inside this context."""
        self.select(index)
        try:
            yield
            self.collect(index)
        finally:
            self.end()

    def _wrong_count(self, count: int) -> str | None:
        for layer in self._layers:
            if layer.given is not None and len(layer.given.experts) != count:
                return (
                    f"the replayed experts have the wrong number of micro-batches: got {len(layer.given.experts)}, "
                    f"expected {count}, those of the step. Pass one mapping for each micro-batch."
                )
        return None

    def _wrong_tokens(self, tokens: Sequence[Sequence[int]]) -> str | None:
        for name, layer in self._all:
            for index, expected in enumerate(tokens):
                found = None if layer.given is None else layer.given.experts[index].shape
                if found is not None and (found[0] not in expected or found[1] != layer.experts_per_token):
                    return (
                        f"the replayed experts of {name} in micro-batch {index} have the wrong shape: got "
                        f"{tuple(found)}, expected {(expected[0], layer.experts_per_token)}, tokens by experts per "
                        "token."
                    )
        return None


def on_padded_tokens(experts: torch.Tensor, counted: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the experts of padded tokens: -1 for the padding.

    Args:
        experts: `[tokens, experts per token]` of all tokens, or of this rank's under sequence parallel.
        counted: bool `[padded tokens]`, which are not padding.
        own: the same of this rank's tokens.
    """
    places = counted if len(experts) == int(counted.sum()) else own
    padded = experts.new_full((len(places), experts.shape[1]), -1)
    padded[places] = experts
    return padded


def of_this_rank(experts: torch.Tensor, shape: torch.Size, context: ParallelContext) -> torch.Tensor:
    """Return the experts of this rank's tokens, of those of all tokens under sequence parallel.

    Args:
        experts: `[tokens, experts per token]`, of all tokens or of this rank's.
        shape: of the layer's input, `[..., tokens, hidden]`.
        context: the parallel context.
    """
    axis, tokens = context.axis("tensor"), shape[:-1].numel()
    if not context.layout.sequence_parallel or axis.size == 1 or len(experts) != tokens * axis.size:
        return experts
    everywhere = experts.view(*shape[:-2], axis.size * shape[-2], experts.shape[-1])
    return everywhere.chunk(axis.size, dim=-2)[axis.rank].reshape(tokens, -1)


def recalled(model: nn.Module) -> Callable[[Callable], Callable]:
    """Return a function that binds a forward pass to the experts that layers replay when it is called.

    What `bind(forward)` returns takes them again when it runs in a backward pass, whatever ran in between.
    """
    layers = [layer for _, layer in expert_layers(model)]

    def bind(forward: Callable) -> Callable:
        taken = [layer.replay for layer in layers]

        def run(*args: object, **kwargs: object) -> object:
            if not in_backward():
                return forward(*args, **kwargs)
            before = [layer.replay for layer in layers]
            for layer, experts in zip(layers, taken):
                layer.replay = layer.replayed_last = experts
            try:
                return forward(*args, **kwargs)
            finally:
                for layer, experts in zip(layers, before):
                    layer.replay = experts

        return run

    return bind if layers else lambda forward: forward
