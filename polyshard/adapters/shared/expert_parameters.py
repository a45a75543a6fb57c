"""The parameters of experts, which have the same names, shapes and gradients in the banks of all libraries."""

from __future__ import annotations

import torch
from torch import nn

from polyshard.adapters.shared.weights import new_weight
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.experts import ExpertBank
from polyshard.core.weight_table import WeightTable
from polyshard.layers.differentiable import transform_gradient


def new_experts(bank: ExpertBank, context: ParallelContext) -> dict[str, nn.Parameter]:
    """Return this rank's parameters of a new bank, by their names in it; see `ExpertBank`."""
    axis = context.axis("expert")
    stds = {"gate_up": bank.hidden_size**-0.5, "down": bank.expert_size**-0.5}
    return {
        name: new_weight(layout, context, stds.get(name)) for name, layout in bank.layouts(axis.rank, axis.size).items()
    }


def weight_in_dtype_of(rows: torch.Tensor, weight: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Return a parameter of experts in the dtype in which rows are computed.

    Its gradient is divided by the expert-parallel size, since it sums over the tokens of all ranks of that axis.

    Args:
        rows: the tokens.
        weight: the parameter.
        axis: the expert axis.
    """
    dtype = rows.dtype
    if rows.device.type != "meta" and torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
    if axis.size > 1 and torch.is_grad_enabled():
        weight = transform_gradient(weight, lambda gradient: gradient / axis.size)
    return weight.to(dtype)


def distributed_experts(table: WeightTable, context: ParallelContext) -> frozenset[str]:
    """Return the parameters that are distributed over the expert axis; none if it has one rank."""
    if context.axis("expert").size == 1:
        return frozenset()
    return frozenset(name for name, entry in table.items() if entry.layout.experts is not None)
