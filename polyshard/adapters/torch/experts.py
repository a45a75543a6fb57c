"""Experts of plain torch tensors: rows sorted by expert, exchanged over the expert axis, and multiplied in groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import override

from polyshard.adapters.shared.expert_parameters import new_experts, weight_in_dtype_of
from polyshard.adapters.torch.grouped import grouped_matmul
from polyshard.core.context import FailureGuard, ParallelAxis, ParallelContext
from polyshard.core.errors import LayoutError
from polyshard.core.experts import ClampedSwiglu, ExpertBank, Routing
from polyshard.layers.activation import clamped_swiglu, swiglu
from polyshard.layers.differentiable import (
    copy_to_region,
    gather_sequence,
    reduce_from_region,
    scatter_sum_sequence,
)


class TorchExperts(nn.Module):
    """The experts of one layer on this rank: `(x [tokens, hidden], Routing) -> [tokens, hidden]`.

    Under sequence parallel, `x` and the result are this rank's tokens; else they are equal on all tensor-parallel
    ranks. No token is dropped.

    Attributes:
        products: `(rows, counts) -> outputs` of this rank's experts, complete on all tensor-parallel ranks, which exact
            mode sets; None for this module's own.
    """

    products: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(self, bank: ExpertBank, context: ParallelContext) -> None:
        super().__init__()
        self.bank = bank
        self.tensor_axis, self.expert_axis = context.axis("tensor"), context.axis("expert")
        self.sequence_parallel = context.layout.sequence_parallel
        self.guard = context.guard
        for name, parameter in new_experts(bank, context).items():
            self.register_parameter(name, parameter)

    # Dynamo fails in grouped_mm for an unknown number of rows (torch 2.13).
    @torch.compiler.disable(reason="the numbers of tokens of experts depend on the routing")
    @override
    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        weights, experts = routing.weights, routing.experts
        enter = partial(gather_sequence, dim=0) if self.sequence_parallel else copy_to_region
        x = enter(x, self.tensor_axis)
        if self.products is None or self.bank.scale_input:  # else the outputs are complete where weights multiply them
            weights = enter(weights, self.tensor_axis)
        if self.sequence_parallel and self.tensor_axis.collectives is not None:
            experts = self.tensor_axis.collectives.all_gather(experts, 0)
        tokens, per_token = experts.shape
        order = experts.reshape(-1).argsort(stable=True)
        # Not bincount, which waits for the device.
        counts = torch.zeros(self.bank.num_experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, experts.reshape(-1), torch.ones_like(order))
        slots = _inverse(order)
        rows = _Dispatch.apply(x, order, slots, per_token)
        if self.bank.scale_input:
            rows = rows * weights.reshape(-1, 1)[order].to(rows.dtype)
        outputs = self._outputs if self.products is None else self.products
        if self.expert_axis.size == 1:
            y = outputs(rows, counts)
        else:
            make = Exchange.of if rows.device.type != "meta" else partial(Exchange.balanced, len(rows))
            exchange = make(counts, self.expert_axis, self.guard)
            y = exchange.back(outputs(exchange.to_experts(rows), exchange.counts))
        if self.products is None and not self.bank.scale_input:
            combined = _Combine.apply(y, weights, order, slots)
        else:
            by_token = _Permute.apply(y, slots, order).view(tokens, per_token, -1).to(weights.dtype)
            if self.products is not None:
                factors = torch.ones_like(weights) if self.bank.scale_input else weights
                return _added_in_order(by_token, factors).to(x.dtype)
            combined = by_token.sum(1)
        combined = combined.to(x.dtype)
        if self.sequence_parallel:
            return scatter_sum_sequence(combined, self.tensor_axis, dim=0)
        return reduce_from_region(combined, self.tensor_axis)

    def _outputs(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the outputs of this rank's experts for rows that are sorted by expert."""
        bank, transposed = self.bank, self.bank.storage.is_transposed
        multiply = partial(grouped_matmul, counts=counts)
        gate_up, down = self.weight_for("gate_up", rows), self.weight_for("down", rows)
        hidden = multiply(rows, gate_up if transposed else gate_up.transpose(1, 2))
        if bank.bias:
            hidden = hidden + self.weight_for("gate_up_bias", rows).repeat_interleave(counts, 0, output_size=len(rows))
        if bank.storage.interleaved:
            hidden = torch.cat((hidden[..., ::2], hidden[..., 1::2]), dim=-1)
        activation = bank.activation
        hidden = clamped_swiglu(hidden, activation) if isinstance(activation, ClampedSwiglu) else swiglu(hidden)
        y = multiply(hidden, down if transposed else down.transpose(1, 2))
        if bank.bias:
            bias = self.weight_for("down_bias", rows)
            if (
                self.tensor_axis.rank
            ):  # added once, though outputs are summed over the axis; every rank has the gradient
                bias = bias - bias.detach()
            y = y + bias.repeat_interleave(counts, 0, output_size=len(rows))
        return y

    def weight_for(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return a parameter in the dtype in which rows are computed, with the gradient of expert parallel."""
        return weight_in_dtype_of(rows, getattr(self, name), self.expert_axis)

    def extra_repr(self) -> str:
        """Return the sizes and this rank's position."""
        expert, tensor = self.expert_axis, self.tensor_axis
        return (
            f"experts={self.bank.num_experts}, hidden={self.bank.hidden_size}, size={self.bank.expert_size}, "
            f"expert_parallel={expert.rank}/{expert.size}, tensor_parallel={tensor.rank}/{tensor.size}"
        )


def _added_in_order(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum over slots of `[tokens, slots, hidden]`, added one by one: no reduction's own order."""
    total, *rest = (slot * weight.unsqueeze(-1) for slot, weight in zip(y.unbind(1), weights.unbind(1)))
    for part in rest:
        total = total + part
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The exchange of rows between the ranks that hold the tokens and those that hold the experts.

    Attributes:
        sent: number of rows for each rank, which are sorted by expert.
        received: number of rows from each rank.
        order: positions among the received rows in the order of this rank's experts.
        counts: int64 `[local experts]`, received rows of each expert.
        axis: the expert axis.
        guard: names the rank at fault.
    """

    sent: list[int]
    received: list[int]
    order: torch.Tensor
    counts: torch.Tensor
    axis: ParallelAxis
    guard: FailureGuard

    @classmethod
    def of(cls, counts: torch.Tensor, axis: ParallelAxis, guard: FailureGuard) -> Exchange:
        """Return the exchange for this rank's rows of each expert, int64 `[experts]`. A collective."""
        sent = counts.view(axis.size, -1)
        received = torch.empty_like(sent)
        with guard("expert all_to_all"):
            dist.all_to_all_single(received, sent, group=axis.group)
        local = torch.arange(sent.shape[1], device=counts.device).repeat(axis.size)
        by_expert = local.repeat_interleave(received.reshape(-1))
        return cls(
            sent=sent.sum(1).tolist(),
            received=received.sum(1).tolist(),
            order=by_expert.argsort(stable=True),
            counts=received.sum(0),
            axis=axis,
            guard=guard,
        )

    @classmethod
    def balanced(cls, rows: int, counts: torch.Tensor, axis: ParallelAxis, guard: FailureGuard) -> Exchange:
        """Return the exchange of equal numbers of rows, for a plan: on the meta device, counts have no values."""
        if rows % axis.size:
            raise LayoutError(
                f"{rows} rows of experts cannot be divided by expert-parallel size {axis.size}, which a plan needs"
            )
        each = [rows // axis.size] * axis.size
        return cls(
            sent=each,
            received=each,
            order=torch.empty(rows, dtype=torch.int64, device=counts.device),
            counts=counts.view(axis.size, -1)[0],
            axis=axis,
            guard=guard,
        )

    def to_experts(self, rows: torch.Tensor) -> torch.Tensor:
        """Send rows `[sent, hidden]` to the ranks of their experts; return those of this rank's, sorted by expert."""
        return _Permute.apply(self._move(rows, self.sent, self.received), self.order, _inverse(self.order))

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the experts' outputs to the ranks of the tokens, in the order of `to_experts`' argument."""
        return self._move(_Permute.apply(rows, _inverse(self.order), self.order), self.received, self.sent)

    def _move(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        return _AllToAll.apply(rows, sent, received, self.axis, self.guard)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """Return the inverse of a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Permute(torch.autograd.Function):
    """Rows in another order; torch's backward of an index would add them up one by one, since they might repeat."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


class _Dispatch(torch.autograd.Function):
    """The row of each token for each of its slots, sorted by expert: `[tokens, hidden]` to `[slots, hidden]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, per_token: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.per_token = per_token
        return x.index_select(0, order.div(per_token, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        by_token = gradients[0].index_select(0, inverse).unflatten(0, (-1, ctx.per_token))
        return by_token.sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """The weighted sum of each token's rows, in the dtype of the weights: `[slots, hidden]` to `[tokens, hidden]`.

    Autograd's own would keep the rows of all slots in the weights' dtype, which is float32, for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        by_token = rows.index_select(0, inverse).unflatten(0, weights.shape)  # [tokens, slots, hidden]
        return by_token.to(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        by_slot = gradients[0].index_select(0, order.div(weights.shape[1], rounding_mode="floor"))
        of_weights = torch.linalg.vecdot(by_slot, rows.to(weights.dtype)).index_select(0, inverse).view_as(weights)
        return (by_slot * weights.reshape(-1, 1)[order]).to(rows.dtype), of_weights, None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], axis: ParallelAxis, guard: FailureGuard
    ) -> torch.Tensor:
        ctx.reverse = received, sent, axis, guard
        return _all_to_all(rows, sent, received, axis, guard)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _all_to_all(gradients[0], *ctx.reverse), None, None, None, None


def _all_to_all(
    rows: torch.Tensor, sent: list[int], received: list[int], axis: ParallelAxis, guard: FailureGuard
) -> torch.Tensor:
    if rows.device.type == "meta":
        planned: Any = axis.collectives
        return planned.all_to_all(rows.unflatten(0, (axis.size, -1))).flatten(0, 1)
    result = rows.new_empty((sum(received), *rows.shape[1:]))
    with guard("expert all_to_all"):
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=axis.group)
    return result
