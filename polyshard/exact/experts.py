"""Experts in exact mode: each expert's rows multiplied by the server's operator, in an order that no batch changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError, LayoutError
from polyshard.core.exact_mode import ExactMode, Matmul
from polyshard.core.experts import ClampedSwiglu, ExpertBank
from polyshard.core.linear_adapter import name_of
from polyshard.exact.matmul import exact_matmul
from polyshard.exact.reduction import sum_in_order
from polyshard.layers.activation import clamped_swiglu, swiglu


class ExactExpertProducts:
    """The outputs of a bank's experts, complete on every tensor-parallel rank.

    Args:
        experts: the module with the parameters.
        bank: its sizes.
        context: the parallel context.
        exact: the exact mode.
    """

    def __init__(self, experts: Any, bank: ExpertBank, context: ParallelContext, exact: ExactMode) -> None:
        self._experts, self._bank, self._exact, self._axis = experts, bank, exact, context.axis("tensor")
        self._count = exact.shards // self._axis.size
        self._packed: list[tuple[Matmul, ...]] | None = None  # a server's, once its weights are loaded
        if (bank.expert_size // self._axis.size) % self._count:
            raise LayoutError(f"exact_shards={exact.shards} does not divide the expert size {bank.expert_size}")

    def pack(self) -> None:
        """Pack copies of the current weights for all further calls; for servers, which know when weights change."""
        pack = self._exact.operators.pack
        matrices = (self._matrices(getattr(self._experts, name)) for name in ("gate_up", "down"))
        self._packed = [
            (pack(gate_up), *(pack(part) for part in down.chunk(self._count, dim=1)))
            for gate_up, down in zip(*matrices)
        ]

    def __call__(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the outputs `[rows, hidden]` of rows that are sorted by expert.

        Args:
            rows: `[rows, hidden]`.
            counts: int64 `[local experts]`, the number of rows of each expert.
        """
        if not len(rows):
            return rows
        gate_up, down = (self._matrices(self._experts.weight_for(name, rows)) for name in ("gate_up", "down"))
        bias = self._experts.weight_for("gate_up_bias", rows) if self._bank.bias else None
        shards: list[list[torch.Tensor]] = [[] for _ in range(self._count)]
        for index, part in enumerate(rows.split(counts.tolist())):
            if not len(part):
                continue
            packed = (None,) * (self._count + 1) if self._packed is None else self._packed[index]
            hidden = exact_matmul(part, gate_up[index], self._exact.operators, packed[0])
            hidden = self._activated(hidden if bias is None else hidden + bias[index])
            pieces = zip(shards, hidden.chunk(self._count, -1), down[index].chunk(self._count, 1), packed[1:])
            for shard, channels, matrix, kept in pieces:
                shard.append(exact_matmul(channels, matrix, self._exact.operators, kept))
        y = sum_in_order([torch.cat(shard) for shard in shards], self._axis, scattered=False)
        if not self._bank.bias:
            return y
        bias = self._experts.weight_for("down_bias", rows)
        return y + bias.repeat_interleave(counts, 0, output_size=len(rows))

    def _matrices(self, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the matrix `[out, in]` of each expert."""
        transposed = self._bank.storage.is_transposed
        return (weights.transpose(1, 2).contiguous() if transposed else weights).unbind(0)

    def _activated(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the activation of `[rows, 2 * size]`, the clamped one computed in float32 and rounded once."""
        if self._bank.storage.interleaved:
            hidden = torch.cat((hidden[..., ::2], hidden[..., 1::2]), dim=-1)
        activation = self._bank.activation
        if not isinstance(activation, ClampedSwiglu):
            return swiglu(hidden)
        return clamped_swiglu(hidden.float(), activation, self._exact.sigmoid).to(hidden.dtype)


def make_exact(experts: nn.Module, bank: ExpertBank, context: ParallelContext, exact: ExactMode) -> None:
    """Make the experts that an adapter built compute exactly.

    Raises:
        AdapterError: these experts have no exact version.
        LayoutError: sequence parallel, or a number of shards that does not divide the expert size.
    """
    if not hasattr(experts, "products"):
        raise AdapterError(
            f"exact mode does not support the experts of {name_of(experts)}: they have no attribute `products`, which "
            "replaces their matrix products. Use the torch adapter's."
        )
    if context.layout.sequence_parallel and context.axis("tensor").size > 1:
        raise LayoutError(
            "exact mode does not support a mixture of experts with sequence parallel. Initialize the context without "
            "sequence_parallel."
        )
    products = ExactExpertProducts(experts, bank, context, exact)
    experts.products = products  # pyrefly: ignore  # checked above
    experts.pack = products.pack  # pyrefly: ignore  # called by a server after it has loaded the weights
