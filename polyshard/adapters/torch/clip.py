"""The norm of a gradient that is sharded over tensor-parallel ranks and replicas, and clipping."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from polyshard.adapters.shared.grad_norm import counted_square, over_stages
from polyshard.adapters.torch.compat import full_tensor, is_dtensor, local_tensor
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.weight_table import WeightTable


def global_grad_norm(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    table: WeightTable,
    context: ParallelContext,
    owned: Collection[str],
) -> torch.Tensor:
    """Return the 2-norm of the full model's gradient, a float32 scalar with the same value on every rank.

    Squares are summed over the tensor and pipeline axes, for FSDP also over the replicas, and for experts over the
    expert axis.

    Args:
        named_parameters: with gradients.
        table: the weight table.
        context: the parallel context.
        owned: the names that count; another pipeline stage counts a weight that is tied to it.
    """
    tensor_axis, replicas, expert_axis = context.axis("tensor"), replica_axis(context), context.axis("expert")
    over_replicas, over_experts, everywhere = torch.zeros(3, device=context.device).unbind(0)
    named, sharded = list(named_parameters), False
    for name, parameter in named:
        sharded = sharded or is_dtensor(parameter)
        if parameter.grad is None or name not in owned:
            continue
        layout = table[name].layout
        if is_dtensor(parameter.grad) and not layout.has_replicas(tensor_axis.size):
            local = local_tensor(parameter.grad)
            square = counted_square(local, layout, tensor_axis.rank, tensor_axis.size)
            over_replicas = over_replicas + square.to(context.device)  # offloaded gradients are on the CPU
        else:
            whole = full_tensor(parameter.grad)
            square = counted_square(whole, layout, tensor_axis.rank, tensor_axis.size)
            if layout.experts is None:
                everywhere = everywhere + square
            else:
                over_experts = over_experts + square
    if tensor_axis.size > 1:
        assert tensor_axis.collectives is not None
        summed = tensor_axis.collectives.all_reduce(torch.stack((over_replicas, over_experts, everywhere)))
        over_replicas, over_experts, everywhere = summed.unbind(0)
    if expert_axis.size > 1:
        assert expert_axis.collectives is not None
        over_experts = expert_axis.collectives.all_reduce(over_experts)
    if sharded and replicas.size > 1:
        assert replicas.collectives is not None
        over_replicas = replicas.collectives.all_reduce(over_replicas)
    return over_stages(over_replicas + over_experts + everywhere, context).sqrt()
