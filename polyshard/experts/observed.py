"""What a layer's router did in training: the pending balance loss, and the load and entropy since they were read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from polyshard.core.context import ParallelAxis, ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.model_weights import gather_over
from polyshard.experts.balance import (
    RouterStatistics,
    balance_loss,
    choices_by_sequence,
    summed_entropy,
    summed_over,
    z_loss,
)

if TYPE_CHECKING:
    from polyshard.experts.layer import MixtureOfExperts

logger = logging.getLogger(__name__)


class Observed:
    """The figures of one layer on this rank.

    Attributes:
        loss: the balance loss of the last forward pass, until `router_loss` takes it.
        load: float64 `[experts]`, choices since `router_statistics` read them.
        unbalanced: float64 `[experts]`, choices since `update_router_bias` read them.
        entropy: sum over these tokens.
        tokens: their number.
        warned: whether a loss was left, with a warning.
        counted: bool `[tokens]`, which tokens of the next forward pass count: not those that a pipeline pads with; None
            for all.
    """

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        self.load: torch.Tensor | None = None
        self.unbalanced: torch.Tensor | None = None
        self.entropy: torch.Tensor | None = None
        self.tokens = 0
        self.warned = False
        self.counted: torch.Tensor | None = None


def observe(
    layer: MixtureOfExperts,
    logits: torch.Tensor,
    experts: torch.Tensor,
    shape: torch.Size,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Add up the choices of one forward pass in training, and keep its balance loss.

    Args:
        layer: the layer.
        logits: `[tokens, experts]`.
        experts: `[tokens, experts per token]`.
        shape: of the layer's input.
        cu_seqlens: boundaries of packed sequences.
    """
    held, recomputes = layer.observed, in_backward()
    if held.counted is not None:
        logits, experts = logits[held.counted], experts[held.counted]
    counts = choices_by_sequence(experts, layer.bank.num_experts, None, 1)[0].double()
    if torch.is_grad_enabled() and not recomputes:  # neither an evaluation nor a trial run of a pipeline stage
        _add_up(held, counts, shares_of(layer, logits.detach()))
    if not layer.balance.has_loss or not torch.is_grad_enabled():
        return
    if held.loss is not None and not held.warned and not recomputes:
        held.warned = True
        logger.warning(
            "the balance loss of a mixture of experts was not added to the model's loss. Use engine.train_batch, or "
            "add polyshard.router_loss(model) to the loss"
        )
    # A recomputed forward pass must save the same tensors for backward, so it computes the loss and drops it.
    loss = _loss(layer, logits, counts, experts, shape, cu_seqlens)
    if not recomputes:
        held.loss = loss


def shares_of(layer: MixtureOfExperts, logits: torch.Tensor) -> torch.Tensor:
    """Return the scores `[tokens, experts]`, divided by their sum over the experts."""
    scores = layer.rule.scores(logits)
    return scores / scores.sum(-1, keepdim=True) if layer.rule.score == "sigmoid" else scores


@torch.no_grad()
def _add_up(held: Observed, counts: torch.Tensor, shares: torch.Tensor) -> None:
    held.load = counts if held.load is None else held.load + counts
    held.unbalanced = counts if held.unbalanced is None else held.unbalanced + counts
    entropy = summed_entropy(shares).double()
    held.entropy = entropy if held.entropy is None else held.entropy + entropy
    held.tokens += len(shares)


def _loss(
    layer: MixtureOfExperts,
    logits: torch.Tensor,
    counts: torch.Tensor,
    experts: torch.Tensor,
    shape: torch.Size,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    balance, context = layer.balance, layer.context
    losses, shares, sequence_ranks = [], shares_of(layer, logits), _sequence_axes(context)
    if balance.z:
        losses.append(balance.z * z_loss(logits))
    if balance.batch:
        total = summed_over(_token_axes(context), counts)[None]
        losses.append(balance.batch * balance_loss(shares, total, None, total.new_tensor([len(logits)])))
    if balance.sequence:
        rows, lengths = _rows(shape, cu_seqlens, sequence_ranks, logits.device)
        if layer.observed.counted is not None:
            rows = torch.zeros_like(layer.observed.counted, dtype=torch.int64) if rows is None else rows
            rows = rows[layer.observed.counted]
            lengths = torch.bincount(rows, minlength=len(lengths))
        by_sequence = choices_by_sequence(experts, layer.bank.num_experts, rows, len(lengths)).double()
        total = summed_over(sequence_ranks, by_sequence)
        losses.append(balance.sequence * balance_loss(shares, total, rows, lengths))
    loss = torch.stack([value.float() for value in losses]).sum()
    # Under sequence parallel, the gradients of tensor-parallel ranks are added up, each a mean over its own tokens.
    return loss / context.axis("tensor").size if context.layout.sequence_parallel else loss


def _sequence_axes(context: ParallelContext) -> tuple[ParallelAxis, ...]:
    """Return the axes whose ranks hold parts of one sequence; the tensor axis, under sequence parallel, first."""
    tensor = (context.axis("tensor"),) if context.layout.sequence_parallel else ()
    return (*tensor, context.axis("context"))


def _rows(
    shape: torch.Size, cu_seqlens: torch.Tensor | None, axes: tuple[ParallelAxis, ...], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the sequence of each token, None for one, and this rank's number of tokens of each sequence."""
    if cu_seqlens is not None and any(axis.size > 1 for axis in axes):
        raise ConfigurationError(
            "Balance(sequence=...) is unsupported for packed sequences that are sharded over ranks (sequence or "
            "context parallel). Use Balance(batch=...), or unpacked input."
        )
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long().to(device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths), lengths
    tokens = shape[:-1].numel()
    count = 1 if len(shape) == 2 else shape[0]
    lengths = torch.full((count,), tokens // count, device=device)
    return (None if count == 1 else torch.arange(tokens, device=device) // (tokens // count)), lengths


def expert_layers(model: nn.Module) -> Iterator[tuple[str, MixtureOfExperts]]:
    """Yield the mixture-of-experts layers of a model, with their names.

    Raises:
        ConfigurationError: `model` is not a module, such as a training engine.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"model is invalid: got {type(model).__name__}, expected a torch.nn.Module. Pass the model, or a training "
            "engine's `module`."
        )
    for name, module in model.named_modules():
        if isinstance(getattr(module, "observed", None), Observed):
            yield name, module  # pyrefly: ignore  # the only module with that attribute


def is_router_bias(name: str) -> bool:
    """Whether a parameter is a router's correction bias, which is float32 and has no gradient."""
    return name.rpartition(".")[2] == "e_score_correction_bias"


def is_stored_router_bias(name: str) -> bool:
    """Whether a tensor in a checkpoint, or in a model of transformers, is a router's correction bias."""
    return name.rpartition(".")[2] in ("e_score_correction_bias", "expert_bias")


def router_loss(model: nn.Module) -> torch.Tensor | None:
    """Take the balance losses of the last forward pass, to be added to a mean loss over the tokens.

    `engine.train_batch` adds it by itself. With your own loop, add it to the loss of each micro-batch, before its
    backward pass.

    Args:
        model: the model, or a training engine's `module`.

    Returns:
        The sum over the layers, a float32 scalar, each with the coefficients of its `Balance`; None without any.

    Examples:
        >>> context = ps.initialize("torch")
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, context, balance=ps.Balance(batch=0.01))
        >>> loss = layer(torch.randn(5, 16)).square().mean() + ps.router_loss(layer)
        >>> loss.backward()
    """
    losses = []
    for _, layer in expert_layers(model):
        if layer.observed.loss is not None:
            losses.append(layer.observed.loss)
            layer.observed.loss = None
    return torch.stack(losses).sum() if losses else None


def router_statistics(model: nn.Module, parallel_context: ParallelContext) -> dict[str, RouterStatistics]:
    """Return what the routers have chosen in training since the last call, over all replicas and pipeline stages.

    This is a collective: every rank must call it. Forward passes without gradients do not count.

    Args:
        model: the model, or a training engine's `module`.
        parallel_context: the context that the model was built with.

    Returns:
        The statistics by the name of the layer; layers that have not run are left out.

    Examples:
        >>> context = ps.initialize("torch")
        >>> model = torch.nn.ModuleDict({"mlp": ps.mixture_of_experts(16, 32, 8, 2, context)})
        >>> _ = model["mlp"](torch.randn(5, 16))
        >>> int(ps.router_statistics(model, context)["mlp"].load.sum())
        10
    """
    found = {}
    for name, layer in expert_layers(model):
        held = layer.observed
        if held.load is None or held.entropy is None:
            continue
        packed = torch.cat((held.load, torch.stack((held.entropy, held.entropy.new_tensor(held.tokens)))))
        *load, entropy, tokens = summed_over(_token_axes(parallel_context), packed).unbind()
        held.load, held.entropy, held.tokens = None, None, 0
        found[name] = RouterStatistics(
            load=torch.stack(load).cpu(), entropy=float(entropy / tokens), tokens=int(tokens)
        )
    with parallel_context.guard("pipeline router statistics"):
        of_stages = gather_over(parallel_context.axis("pipeline"), found)
    return {name: statistics for of_stage in of_stages for name, statistics in of_stage.items()}


@torch.no_grad()
def update_router_bias(model: nn.Module, parallel_context: ParallelContext) -> None:
    """Move each router's correction bias towards a balanced load, without a loss. A collective.

    The bias of an expert rises by `Balance.bias_rate` if its load since the last update was below the mean, and falls
    if it was above. Call it after each `engine.step()`. Layers without a rate are left unchanged.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts".

    Args:
        model: the model, or a training engine's `module`.
        parallel_context: the context that the model was built with.

    Raises:
        ConfigurationError: a layer has a rate, but its router no correction bias.

    Examples:
        >>> context = ps.initialize("torch")
        >>> router = ps.Router(score="sigmoid", normalize=True, correction_bias=True)
        >>> layer = ps.mixture_of_experts(16, 32, 8, 2, context, router=router, balance=ps.Balance(bias_rate=0.001))
        >>> _ = layer(torch.randn(5, 16))
        >>> ps.update_router_bias(layer, context)
        >>> layer.correction.abs().max()
        tensor(0.0010)
    """
    for name, layer in expert_layers(model):
        if not layer.balance.bias_rate:
            continue
        bias = layer.correction
        if bias is None:
            raise ConfigurationError(
                f"{name or 'the layer'} has Balance.bias_rate, but no bias. Set Router(correction_bias=True)."
            )
        if layer.observed.unbalanced is None:
            continue
        load = summed_over(_token_axes(parallel_context), layer.observed.unbalanced)
        layer.observed.unbalanced = None
        bias.add_((load.mean() - load).sign().to(bias.dtype), alpha=layer.balance.bias_rate)


def _token_axes(context: ParallelContext) -> tuple[ParallelAxis, ...]:
    """Return the axes over which tokens are distributed."""
    tensor = (context.axis("tensor"),) if context.layout.sequence_parallel else ()
    return (*tensor, replica_axis(context))


def in_backward() -> bool:
    """Whether a backward pass is running, which recomputes a forward pass. torch.compile traces the first one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
