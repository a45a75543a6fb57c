"""The norm of a gradient that is spread over tensor and data ranks, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from polyshard.adapters.torch.compat import full_tensor, is_dtensor, local_tensor
from polyshard.core.context import ParallelContext
from polyshard.core.weight_layout import WeightLayout
from polyshard.core.weight_table import WeightTable


def global_grad_norm(
    named_parameters: Iterable[tuple[str, nn.Parameter]], table: WeightTable, context: ParallelContext
) -> torch.Tensor:
    """The 2-norm of the logical model's gradient, the same number on every rank; float32 scalar.

    Each logical element counts once: shards are summed over the tensor axis, whole parameters are counted on its
    first rank, replicated KV heads by their share, and FSDP's shards are summed over the data axis.
    """
    tensor_axis = context.axis("tensor")
    data_axis = context.axis("data")
    zero = torch.zeros((), device=context.device)
    over_data, everywhere = zero.clone(), zero.clone()
    for name, parameter in named_parameters:
        if parameter.grad is None:
            continue
        layout = table[name].layout
        if layout.has_replicas(tensor_axis.size):
            everywhere += _replicated_square(full_tensor(parameter.grad), layout, tensor_axis.rank, tensor_axis.size)
        elif layout.dim is not None or tensor_axis.rank == 0:
            square = torch.linalg.vector_norm(local_tensor(parameter.grad), dtype=torch.float32).square()
            if is_dtensor(parameter.grad):
                over_data += square
            else:
                everywhere += square
    if tensor_axis.size > 1:
        assert tensor_axis.collectives is not None
        both = tensor_axis.collectives.all_reduce(torch.stack((over_data, everywhere)))
        over_data, everywhere = both.unbind(0)
    if data_axis.size > 1:
        assert data_axis.collectives is not None
        over_data = data_axis.collectives.all_reduce(over_data)
    return (over_data + everywhere).sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their norm is at most `max_norm`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local_tensor(parameter.grad).mul_(factor)


def _replicated_square(gradient: torch.Tensor, layout: WeightLayout, rank: int, size: int) -> torch.Tensor:
    total = torch.zeros((), device=gradient.device)
    for index, segment in enumerate(layout.segments):
        start, length = layout.local_offset(index, rank, size)
        part = gradient.narrow(layout.dim or 0, start, length)
        total += torch.linalg.vector_norm(part, dtype=torch.float32).square() / segment.replicas(size)
    return total
