"""One rank's contribution to the squared gradient norm of the full model, and clipping."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_sharding import WeightLayout
from polyshard.core.weight_table import WeightEntry, WeightTable
from polyshard.weights.regions import Region, regions


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise `ConfigurationError` unless it is a positive number, or None for no clipping."""
    if max_grad_norm is not None and not (isinstance(max_grad_norm, numbers.Real) and max_grad_norm > 0):
        raise ConfigurationError(f"max_grad_norm must be positive, or None, got {max_grad_norm!r}")


def counted_square(gradient: torch.Tensor, layout: WeightLayout, rank: int, size: int) -> torch.Tensor:
    """Return this rank's contribution to a parameter's squared gradient norm, a float32 scalar.

    The sum over the tensor axis counts each logical element once: shards on their rank, replicated parameters on the
    first rank only, and parts that several ranks hold divided by the number of replicas.

    Args:
        gradient: the gradient of this rank's shard, not sharded over the data axis.
        layout: the parameter's weight layout.
        rank: this rank's position on the tensor axis.
        size: the size of the tensor axis.
    """
    if layout.has_replicas(size):
        total = torch.zeros((), device=gradient.device)
        for index, segment in enumerate(layout.segments):
            start, length = layout.local_offset(index, rank, size)
            part = gradient.narrow(layout.dim or 0, start, length)
            total += _square(part) / segment.replicas(size)
        return total
    if layout.dim is None and rank != 0:
        return torch.zeros((), device=gradient.device)
    return _square(gradient)


def _square(gradient: torch.Tensor) -> torch.Tensor:
    """Return the squared norm in float32; torch sums float64 gradients in float64 only."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).square().float()


def counted_parts(entry: WeightEntry, values: torch.Tensor, start: int, rank: int, size: int) -> list[torch.Tensor]:
    """Return views of the elements that count, so that each logical element counts on one rank only.

    Elements of replicated weights count on the first rank, those of shared KV heads on the first rank that holds them,
    and padding nowhere.

    Args:
        entry: of the parameter.
        values: a run of this rank's flattened shard, 1-D; a library's own padding may follow it.
        start: position of its first element in the flattened shard.
        rank: position along the tensor axis.
        size: of the tensor axis.
    """
    return [region.view(values, start) for region in _counted_regions(entry, values.numel(), start, rank, size)]


@cache  # asked for every parameter in every step
def _counted_regions(entry: WeightEntry, count: int, start: int, rank: int, size: int) -> tuple[Region, ...]:
    held = max(0, min(count, math.prod(entry.layout.local_shape(rank, size)) - start))
    return tuple(region for region in regions(entry, rank, size, start, start + held) if region.first)


def unsharded_norm(
    named: Iterable[tuple[str, nn.Parameter]], table: WeightTable, context: ParallelContext, owned: Collection[str]
) -> torch.Tensor:
    """Return the norm of the full model's gradient if all replicas hold it. A collective over the model's axes.

    Args:
        named: this rank's parameters, with gradients.
        table: their weight table.
        context: the parallel context.
        owned: the names that count; another pipeline stage counts a weight that is tied to it.
    """
    axis, expert_axis = context.axis("tensor"), context.axis("expert")
    dense, experts = torch.zeros(2, device=context.device).unbind(0)
    for name, parameter in named:
        if parameter.grad is None or name not in owned:
            continue
        layout = table[name].layout
        square = counted_square(parameter.grad, layout, axis.rank, axis.size)
        dense, experts = (dense + square, experts) if layout.experts is None else (dense, experts + square)
    if expert_axis.size > 1:
        assert expert_axis.collectives is not None
        experts = expert_axis.collectives.all_reduce(experts)
    total = dense + experts
    if axis.size > 1:
        assert axis.collectives is not None
        total = axis.collectives.all_reduce(total)
    return over_stages(total, context).sqrt()


def over_stages(square: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """Return the squared norm summed over the pipeline stages. A collective over the pipeline axis."""
    axis = context.axis("pipeline")
    if axis.size == 1:
        return square
    assert axis.collectives is not None
    return axis.collectives.all_reduce(square)


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Return the factor that scales gradients to a norm of at most `max_norm`, as torch's `clip_grad_norm_` does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def scale_gradients(
    parameters: Iterable[nn.Parameter],
    norm: torch.Tensor,
    max_norm: float | None,
    scale: float = 1.0,
    local: Callable[[Any], torch.Tensor] = lambda gradient: gradient,
) -> None:
    """Divide gradients by the factor on the loss, and scale them so that their norm is at most `max_norm`, in place.

    Args:
        parameters: with gradients.
        norm: of the gradients as they are, scalar.
        max_norm: None does not clip.
        scale: the factor that the loss had.
        local: gives this rank's part of a gradient.
    """
    if max_norm is None and scale == 1.0:
        return
    factor = torch.ones_like(norm) / scale
    if max_norm is not None:
        factor = factor * clip_factor(norm / scale, max_norm)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            gradient.mul_(factor.to(gradient.device))  # an offloaded gradient is on the CPU
