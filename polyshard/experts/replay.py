"""Record which experts tokens take, and replay them in another forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.errors import ConfigurationError
from polyshard.core.stages import Stages
from polyshard.experts.observed import expert_layers
from polyshard.experts.step_routing import GivenExperts

if TYPE_CHECKING:
    from polyshard.experts.layer import MixtureOfExperts


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Record the experts that the routers choose, in the forward passes inside this context.

    Args:
        model: the model, or a training engine's `module`.

    Yields:
        A list that is filled at the end of the context. It has one item for each micro-batch of the last `train_batch`
        or `eval_batch`, or a single item for the last forward pass of your own: the experts of each layer, int64
        `[tokens, experts per token]`, by the layer's name. Under sequence or context parallel, those of this rank's
        tokens. In a pipeline, those of the layers of this rank's stages; a rank without such a layer gets no items.

    Examples:
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, ps.initialize("torch"))
        >>> with record_routing(layer) as recorded:
        ...     _ = layer(torch.randn(5, 16))
        >>> recorded[0][""].shape
        torch.Size([5, 2])
    """
    recorded: list[dict[str, torch.Tensor]] = []
    layers = dict(expert_layers(model))
    for layer in layers.values():
        layer.records, layer.recorded, layer.recorded_in_step = True, None, {}
    try:
        yield recorded
        for layer in layers.values():
            if layer.recorded is not None:  # a forward pass that no step ran
                layer.recorded_in_step = {0: layer.recorded}
        count = max((len(layer.recorded_in_step) for layer in layers.values()), default=0)
        recorded.extend(
            {name: layer.recorded_in_step[index] for name, layer in layers.items() if index in layer.recorded_in_step}
            for index in range(count)
        )
    finally:
        for layer in layers.values():
            layer.records, layer.recorded, layer.recorded_in_step = False, None, {}


Experts = Mapping[str, torch.Tensor]


@contextmanager
def replay_routing(model: nn.Module, experts: Experts | Sequence[Experts]) -> Iterator[None]:
    """Make tokens take given experts, such as those that a server or an earlier forward pass took.

    The weights of the experts are computed from this model's own logits, so that the router gets a gradient. A forward
    pass that is recomputed for backward takes the experts of its first run, also after the end of the context. With
    `torch.utils.checkpoint` of your own instead of an engine's `recompute=`, run the backward pass of one forward pass
    before the next forward pass, or use `train_batch`.

    Args:
        model: the model, or a training engine's `module`.
        experts: int64 `[tokens, experts per token]` or `[batch, seq, experts per token]` of each layer, by its name, as
            from `packed_routing`; for a token with only -1 the router chooses. For several micro-batches of
            `train_batch` or `eval_batch`, a sequence of such mappings, as from `record_routing`. Under sequence
            parallel they are those of all tokens or of this rank's tokens; under context parallel, of this rank's
            tokens: `ps.context_shard` shards them. In a pipeline, they are those of the full model or of this rank's
            layers.

    Raises:
        ConfigurationError: `experts` is not such a mapping or sequence, a layer is missing or unknown, an expert does
            not exist, or a token takes one twice; or, in the forward pass or the step, the shape or the number of
            micro-batches is wrong.

    Examples:
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, ps.initialize("torch"))
        >>> x = torch.randn(5, 16)
        >>> with ps.record_routing(layer) as recorded:
        ...     y = layer(x)
        >>> with replay_routing(layer, recorded):
        ...     torch.equal(layer(x), y)
        True
    """
    layers = dict(expert_layers(model))
    passes = _passes(experts)
    if layers and not passes:
        raise ConfigurationError("the replayed experts are empty. Pass one mapping for each micro-batch.")
    in_stages = _in_stages(model, layers.values())
    taken: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for index, given in enumerate(passes):
        of_pass = "" if isinstance(experts, Mapping) else f" of micro-batch {index}"
        missing, unexpected = sorted(set(layers) - set(given)), sorted(set(given) - set(layers))
        if missing or (unexpected and not in_stages):  # a step compares them with the layers of all stages
            raise ConfigurationError(
                f"the replayed experts{of_pass} do not fit the model: missing {missing}, unexpected {unexpected}. "
                "Record them with the same model."
            )
        for name, layer in layers.items():
            taken[name].append(_checked(given[name], f"{name or 'the layer'}{of_pass}", layer))
    names = frozenset(name for given in passes for name in given)
    for name, layer in layers.items():
        layer.given = GivenExperts(tuple(taken[name]), names)
        layer.replay = layer.given.outside_of_steps
    try:
        yield
    finally:
        for layer in layers.values():
            layer.given = layer.replay = None


def _passes(experts: Any) -> tuple[Experts, ...]:
    """Return the experts of each micro-batch."""
    if isinstance(experts, Mapping):
        return (experts,)
    expected = "expected a mapping from layers to tensors, or a sequence of such mappings, one for each micro-batch"
    if not isinstance(experts, Sequence) or isinstance(experts, str):
        raise ConfigurationError(f"experts is invalid: got {type(experts).__name__}, {expected}.")
    for index, given in enumerate(experts):
        if not isinstance(given, Mapping):
            raise ConfigurationError(f"experts[{index}] is invalid: got {type(given).__name__}, {expected}.")
    return tuple(experts)


def _in_stages(model: nn.Module, layers: Iterable[MixtureOfExperts]) -> bool:
    """Whether the model is one of several pipeline stages."""
    staged = isinstance(model, Stages) and model.plan.num_stages > 1
    return staged or any(layer.context.axis("pipeline").size > 1 for layer in layers)


def _checked(experts: Any, name: str, layer: MixtureOfExperts) -> torch.Tensor:
    """Return experts as int64 `[tokens, experts per token]` on the layer's device."""
    if not isinstance(experts, torch.Tensor):
        raise ConfigurationError(
            f"the replayed experts of {name} are invalid: got {type(experts).__name__}, expected an int64 tensor "
            "[tokens, experts per token]."
        )
    if experts.dim() < 2 or experts.is_floating_point() or experts.dtype == torch.bool:
        raise ConfigurationError(
            f"the replayed experts of {name} are invalid: got {tuple(experts.shape)} {experts.dtype}, expected int64 "
            "[tokens, experts per token]."
        )
    if experts.numel() and not -1 <= int(experts.min()) <= int(experts.max()) < layer.bank.num_experts:
        raise ConfigurationError(
            f"the replayed experts of {name} are out of range: got {int(experts.min())} to {int(experts.max())}, "
            f"expected -1 to {layer.bank.num_experts - 1}."
        )
    in_order = experts.sort(dim=-1).values
    twice = (in_order[..., 1:] == in_order[..., :-1]) & (in_order[..., 1:] >= 0)
    partly = (in_order[..., :1] < 0) & (in_order[..., -1:] >= 0)  # the router might choose a given expert again
    wrong = int((twice.any(-1) | partly.any(-1)).sum())
    if wrong:
        raise ConfigurationError(
            f"the replayed experts of {name} are contradictory for {wrong} of {experts[..., 0].numel()} tokens: got an "
            "expert twice, or -1 beside an expert, expected different experts or only -1."
        )
    return experts.flatten(0, -2).to(layer.context.device, torch.int64)


def packed_routing(rollouts: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return the experts of packed sequences, each a prompt with its sampled tokens, for `replay_routing`.

    Args:
        rollouts: rollouts of an engine with `return_routing=True`, in the order in which they are packed.

    Returns:
        int64 `[tokens, experts per token]` by layer. The last token of each sequence, which the server never saw, has
        -1: its router chooses.

    Raises:
        ConfigurationError: a rollout has no routing or that of other layers, or there is no rollout.

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
    if not isinstance(rollouts, Sequence):
        raise ConfigurationError(f"rollouts is invalid: got {type(rollouts).__name__}, expected a list of rollouts.")
    for index, rollout in enumerate(rollouts):
        if not hasattr(rollout, "routing"):
            nested = " Flatten the groups that generate returns." if isinstance(rollout, Sequence) else ""
            raise ConfigurationError(
                f"rollouts[{index}] is invalid: got {type(rollout).__name__}, expected a Rollout.{nested}"
            )
    if not rollouts or any(rollout.routing is None for rollout in rollouts):
        raise ConfigurationError("a rollout has no routing. Create the engine with return_routing=True.")
    names = list(rollouts[0].routing)
    for index, rollout in enumerate(rollouts):
        if set(rollout.routing) != set(names):
            raise ConfigurationError(
                f"rollouts[{index}] has routing of other layers: got {sorted(rollout.routing)}, expected "
                f"{sorted(names)}, those of rollouts[0]. Pack rollouts of one model."
            )
    return {
        name: torch.cat([F.pad(rollout.routing[name], (0, 0, 0, 1), value=-1) for rollout in rollouts])
        for name in names
    }
