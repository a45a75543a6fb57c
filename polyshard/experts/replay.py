"""Record which experts tokens take, and replay them in another forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

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
        experts: int64 `[tokens, experts per token]` of each layer, by its name, as from `record_routing`.

    Raises:
        ConfigurationError: a layer is missing or unknown; or, in the forward pass, the shape is wrong.

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
        layer.replay = experts[name].to(layer.context.device)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.replay = None
