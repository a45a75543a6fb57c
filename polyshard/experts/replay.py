"""Record which experts tokens take, and replay them in another forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.errors import ConfigurationError
from polyshard.experts.observed import expert_layers


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the experts that the routers choose, in the forward passes inside this context.

    Args:
        model: the model, or a training engine's `module`.

    Yields:
        A dict that is filled at the end of the context: the experts of the last forward pass of each layer, int64
        `[tokens, experts per token]`, by the layer's name. Under sequence or context parallel, those of this rank's
        tokens.

    Examples:
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, ps.initialize("torch"))
        >>> with record_routing(layer) as experts:
        ...     _ = layer(torch.randn(5, 16))
        >>> experts[""].shape
        torch.Size([5, 2])
    """
    recorded: dict[str, torch.Tensor] = {}
    layers = dict(expert_layers(model))
    for layer in layers.values():
        layer.records, layer.recorded = True, None
    try:
        yield recorded
        recorded.update({name: layer.recorded for name, layer in layers.items() if layer.recorded is not None})
    finally:
        for layer in layers.values():
            layer.records, layer.recorded = False, None


@contextmanager
def replay_routing(model: nn.Module, experts: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Make tokens take given experts, such as those that a server or an earlier forward pass took.

    The weights of the experts are computed from this model's own logits, so that the router gets a gradient. A forward
    pass that is recomputed for backward takes the experts of its first run, also after the end of the context.

    Args:
        model: the model, or a training engine's `module`.
        experts: int64 `[tokens, experts per token]` of each layer, by its name, as from `record_routing` or
            `packed_routing`; -1 lets the router choose.

    Raises:
        ConfigurationError: a layer is missing or unknown, or an expert does not exist; or, in the forward pass, the
            shape is wrong.

    Examples:
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, ps.initialize("torch"))
        >>> x = torch.randn(5, 16)
        >>> with ps.record_routing(layer) as experts:
        ...     y = layer(x)
        >>> with replay_routing(layer, experts):
        ...     torch.equal(layer(x), y)
        True
    """
    layers = dict(expert_layers(model))
    if set(layers) != set(experts):
        raise ConfigurationError(
            f"the replayed experts do not fit the model: missing {sorted(set(layers) - set(experts))}, unexpected "
            f"{sorted(set(experts) - set(layers))}. Record them with the same model."
        )
    for name, layer in layers.items():
        if (
            experts[name].numel()
            and not -1 <= int(experts[name].min()) <= int(experts[name].max()) < layer.bank.num_experts
        ):
            raise ConfigurationError(
                f"the replayed experts of {name or 'the layer'} are out of range: got {int(experts[name].min())} to "
                f"{int(experts[name].max())}, expected -1 to {layer.bank.num_experts - 1}."
            )
    for name, layer in layers.items():
        layer.replay = experts[name].to(layer.context.device)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.replay = None


def packed_routing(rollouts: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the experts of packed sequences, each a prompt with its sampled tokens, for `replay_routing`.

    Args:
        rollouts: rollouts of an engine with `return_routing=True`, in the order in which they are packed.

    Returns:
        int64 `[tokens, experts per token]` by layer. The last token of each sequence, which the server never saw, has
        -1: its router chooses.

    Raises:
        ConfigurationError: a rollout has no routing, or there is no rollout.

    Examples:
        >>> rollout = ps.Rollout(
        ...     prompt=(1, 2), tokens=(7,), logprobs=(-0.5,), finished=True, version="4",
        ...     routing={"mlp": torch.tensor([[3, 0], [1, 2]])},
        ... )
        >>> packed_routing([rollout])["mlp"]
        tensor([[ 3,  0],
                [ 1,  2],
                [-1, -1]])
    """
    if not rollouts or any(rollout.routing is None for rollout in rollouts):
        raise ConfigurationError("a rollout has no routing. Create the engine with return_routing=True.")
    return {
        name: torch.cat([F.pad(rollout.routing[name], (0, 0, 0, 1), value=-1) for rollout in rollouts])
        for name in rollouts[0].routing
    }
