"""DeepSpeed's dropless experts and their exchange behind `create_experts` of the `LinearAdapter`."""

from __future__ import annotations

import torch
from torch import nn
from typing_extensions import override

from polyshard.adapters.deepspeed.compat import init_communication
from polyshard.adapters.deepspeed.experts_compat import (
    combine,
    exchange,
    exchange_plan,
    new_grouped_experts,
    run_experts,
)
from polyshard.adapters.shared.expert_parameters import new_experts, weight_in_dtype_of
from polyshard.core.context import ParallelContext
from polyshard.core.experts import ExpertBank, Routing
from polyshard.layers.differentiable import copy_to_region, reduce_from_region


class DeepspeedExperts(nn.Module):
    """The experts and the all-to-all of DeepSpeed's AutoEP: `(x [tokens, hidden], Routing) -> [tokens, hidden]`.

    They take any routing and drop no token; DeepSpeed's older `MOELayer` has a capacity. The routing weights and the
    sum over a token's experts are in float32.

    Args:
        bank: the experts: SwiGLU without biases, stored one by one.
        context: the parallel context.
    """

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, bank: ExpertBank, context: ParallelContext) -> None:
        super().__init__()
        self.bank = bank
        self.tensor_axis, self.expert_axis = context.axis("tensor"), context.axis("expert")
        self.guard = context.guard
        for name, parameter in new_experts(bank, context).items():
            self.register_parameter(name, parameter)
        if self.expert_axis.size > 1:
            init_communication()
        count, hidden, size = self.down.shape
        # A tuple, which hides the experts without weights from `parameters()`.
        self._experts = new_grouped_experts(hidden, size, count)

    @torch.compiler.disable(reason="the numbers of tokens of experts depend on the routing")
    @override
    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        tokens, weights = (copy_to_region(part, self.tensor_axis) for part in (x, routing.weights))
        experts, axis = routing.experts, self.expert_axis
        order = experts.reshape(-1).argsort(stable=True)
        rows = tokens[order.div(experts.shape[1], rounding_mode="floor")]
        with self.guard("expert all_to_all"):
            plan = exchange_plan(experts, self.bank.num_experts, axis)
            rows = exchange(rows, plan.input_splits, plan.output_splits, axis)
        gate_up, down = (weight_in_dtype_of(rows, weight, axis) for weight in (self.gate_up, self.down))
        y = run_experts(self._experts, gate_up, down, rows.to(gate_up.dtype), plan.local_counts_by_source)
        with self.guard("expert all_to_all"):
            y = exchange(y, plan.output_splits, plan.input_splits, axis)
        return reduce_from_region(combine(y, weights, order).to(x.dtype), self.tensor_axis)

    def extra_repr(self) -> str:
        """Return the sizes and this rank's position."""
        expert, tensor = self.expert_axis, self.tensor_axis
        return (
            f"experts={self.bank.num_experts}, hidden={self.bank.hidden_size}, size={self.bank.expert_size}, "
            f"expert_parallel={expert.rank}/{expert.size}, tensor_parallel={tensor.rank}/{tensor.size}"
        )
