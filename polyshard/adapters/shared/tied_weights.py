"""Weights that several pipeline ranks hold: equal copies at the start, and one gradient, the sum of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.model_weights import ModelWeights


def copy_from_owners(parameters: Mapping[str, torch.Tensor], weights: ModelWeights, context: ParallelContext) -> None:
    """Give every copy of a tied weight the values of its owner, the first stage that holds it. A collective.

    Args:
        parameters: of this rank, by name; what they hold of a weight must have the same shape on all its holders.
        weights: the weights of all stages.
        context: the parallel context.
    """
    axis = context.axis("pipeline")
    for name in sorted(weights.holders):  # one order on all ranks
        holders = weights.holders[name]
        if axis.rank in holders and name in parameters:
            with context.guard("pipeline tied weights"), torch.no_grad():
                _from_owner(parameters[name].detach(), holders, axis)


def sum_tied_gradients(
    parameters: Mapping[str, torch.Tensor],
    weights: ModelWeights,
    context: ParallelContext,
    local: Callable[[Any], torch.Tensor] = lambda gradient: gradient,
) -> None:
    """Replace the gradient of each copy of a tied weight by the sum over its copies, equal bit for bit. A collective.

    A copy without a gradient, such as that of a head that a loss does not use, counts as zero and gets the sum.

    Args:
        parameters: of this rank, by name, with gradients that are averaged over the replicas.
        weights: the weights of all stages.
        context: the parallel context.
        local: gives this rank's part of a gradient.
    """
    gradients: dict[str, torch.Tensor] = {}
    for name in weights.holders.keys() & parameters.keys():
        parameter = parameters[name]
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients[name] = local(parameter.grad)
    sum_over_copies(gradients, weights, context)


def sum_over_copies(gradients: Mapping[str, torch.Tensor], weights: ModelWeights, context: ParallelContext) -> None:
    """Replace each gradient of a tied weight by the sum over the weight's copies, in place. A collective.

    Args:
        gradients: by the names of this rank's parameters; all holders of a weight must pass its gradient.
        weights: the weights of all stages.
        context: the parallel context.
    """
    axis = context.axis("pipeline")
    for name in sorted(weights.holders):  # one order on all ranks
        holders = weights.holders[name]
        if axis.rank not in holders or name not in gradients:
            continue
        with context.guard("pipeline tied gradients"), torch.no_grad():
            gradient = gradients[name].detach()
            if axis.rank == holders[0]:
                for other in holders[1:]:  # in one order
                    received = torch.empty_like(_on_wire(gradient, axis), memory_format=torch.contiguous_format)
                    dist.recv(received, src=axis.ranks[other], group=axis.group)
                    gradient.add_(received.to(gradient.device))
            else:
                dist.send(_on_wire(gradient, axis), dst=axis.ranks[holders[0]], group=axis.group)
            _from_owner(gradient, holders, axis)


def _from_owner(tensor: torch.Tensor, holders: tuple[int, ...], axis: ParallelAxis) -> None:
    if axis.rank == holders[0]:
        for other in holders[1:]:
            dist.send(_on_wire(tensor, axis), dst=axis.ranks[other], group=axis.group)
        return
    received = torch.empty_like(_on_wire(tensor, axis), memory_format=torch.contiguous_format)
    dist.recv(received, src=axis.ranks[holders[0]], group=axis.group)
    tensor.copy_(received)


def _on_wire(tensor: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Return a contiguous tensor that the backend can send: gloo sends from host memory only."""
    source = tensor.contiguous()
    assert axis.group is not None
    return source.cpu() if source.is_cuda and dist.get_backend(axis.group) == "gloo" else source
