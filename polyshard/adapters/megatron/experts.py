"""Megatron-Core's experts and token dispatchers behind `create_experts` of the `LinearAdapter`."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from typing_extensions import override

from polyshard.adapters.megatron.experts_compat import (
    TokenDispatcher,
    experts_config,
    new_dispatcher,
    new_sequential_mlp,
    run_experts,
)
from polyshard.adapters.shared.expert_parameters import new_experts, weight_in_dtype_of
from polyshard.core.context import ParallelContext
from polyshard.core.experts import ExpertBank, Routing
from polyshard.layers.differentiable import copy_to_region, gather_sequence, reduce_from_region, scatter_sum_sequence


class MegatronExperts(nn.Module):
    """Megatron's `SequentialMLP` with its token dispatcher: `(x [tokens, hidden], Routing) -> [tokens, hidden]`.

    Megatron scales an expert's activations by the routing weights, before the down projection, and adds the outputs of
    a token in the order of its experts, in their dtype. No token is dropped.

    Args:
        bank: the experts: SwiGLU without biases, stored one by one.
        context: a context of the Megatron adapter.
        token_dispatcher: `"alltoall"` or `"allgather"`.
    """

    gate_up: nn.Parameter
    down: nn.Parameter

    def __init__(self, bank: ExpertBank, context: ParallelContext, token_dispatcher: TokenDispatcher) -> None:
        super().__init__()
        self.bank = bank
        self.tensor_axis, self.expert_axis = context.axis("tensor"), context.axis("expert")
        self.sequence_parallel = context.layout.sequence_parallel and self.tensor_axis.size > 1
        self.guard = context.guard
        for name, parameter in new_experts(bank, context).items():
            self.register_parameter(name, parameter)
        group = self.expert_axis.group
        count = len(self.gate_up)
        first = self.expert_axis.rank * count
        self._config = experts_config(bank, self.expert_axis.size, self.gate_up.dtype)
        # In a tuple, which hides the experts without weights from `parameters()`.
        self._experts = (new_sequential_mlp(self._config, count, self.tensor_axis.group, group),)
        self._dispatcher = new_dispatcher(
            token_dispatcher, self._config, range(first, first + count), group, context.device
        )

    @torch.compiler.disable(reason="the numbers of tokens of experts depend on the routing")
    @override
    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        enter = partial(gather_sequence, dim=0) if self.sequence_parallel else copy_to_region
        experts, axis = routing.experts, self.tensor_axis
        tokens, weights = enter(x, axis), enter(routing.weights, axis)
        if self.sequence_parallel and axis.collectives is not None:
            experts = axis.collectives.all_gather(experts, 0)
        dense = len(tokens), self.bank.num_experts
        chosen = torch.zeros(dense, dtype=torch.bool, device=x.device).scatter_(1, experts, True)
        probabilities = weights.new_zeros(dense).scatter_add(1, experts, weights)

        self._config.moe_router_topk = experts.shape[1]
        dispatcher = self._dispatcher
        with self.guard("expert dispatch"):
            rows, scales = dispatcher.dispatch_preprocess(tokens, chosen, probabilities)
            rows, scales = dispatcher.token_dispatch(rows, scales)
            rows, counts, scales = dispatcher.dispatch_postprocess(rows, scales)
        gate_up, down = (weight_in_dtype_of(rows, w, self.expert_axis) for w in (self.gate_up, self.down))
        y = run_experts(self._experts[0], gate_up, down, rows.to(gate_up.dtype), counts, scales)
        with self.guard("expert combine"):
            y = dispatcher.token_combine(dispatcher.combine_preprocess(y))
        y = dispatcher.combine_postprocess(y).to(x.dtype)
        return scatter_sum_sequence(y, axis, dim=0) if self.sequence_parallel else reduce_from_region(y, axis)

    def extra_repr(self) -> str:
        """Return the sizes and this rank's position."""
        expert, tensor = self.expert_axis, self.tensor_axis
        return (
            f"experts={self.bank.num_experts}, hidden={self.bank.hidden_size}, size={self.bank.expert_size}, "
            f"expert_parallel={expert.rank}/{expert.size}, tensor_parallel={tensor.rank}/{tensor.size}"
        )
