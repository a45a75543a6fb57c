"""Experts in exact mode: each expert's rows multiplied by the server's operator, in an order that no batch changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError, LayoutError
from polyshard.core.exact_mode import ExactMode, Matmul
from polyshard.core.experts import ExpertBank
from polyshard.core.linear_adapter import name_of
from polyshard.exact.matmul import exact_matmul
from polyshard.exact.reduction import sum_in_order
from polyshard.layers.activation import swiglu


class ExactExpertProducts:
    """The outputs of a bank's experts, complete on every tensor-parallel rank.

    Args:
        experts: the module with the parameters.
        bank: its sizes.
        context: the parallel context.
        exact: the exact mode.
    """

    def __init__(self, experts: Any, bank: ExpertBank, context: ParallelContext, exact: ExactMode) -> None:
        self._experts, self._exact, self._axis = experts, exact, context.axis("tensor")
        self._count = exact.shards // self._axis.size
        self._packed: list[tuple[Matmul, ...]] | None = None  # a server's, once its weights are loaded
        if (bank.expert_size // self._axis.size) % self._count:
            raise LayoutError(f"exact_shards={exact.shards} does not divide the expert size {bank.expert_size}")

    def pack(self) -> None:
        """Pack copies of the current weights for all further calls; for servers, which know when weights change."""
        pack = self._exact.operators.pack
        self._packed = [
            (pack(gate_up), *(pack(part) for part in down.chunk(self._count, dim=1)))
            for gate_up, down in zip(self._experts.gate_up, self._experts.down)
        ]

    def __call__(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return the outputs `[rows, hidden]` of rows that are sorted by expert.

        Args:
            rows: `[rows, hidden]`.
            counts: int64 `[local experts]`, the number of rows of each expert.
        """
        if not len(rows):
            return rows
        gate_up, down = (self._experts.weight_for(name, rows).unbind(0) for name in ("gate_up", "down"))
        shards: list[list[torch.Tensor]] = [[] for _ in range(self._count)]
        for index, part in enumerate(rows.split(counts.tolist())):
            if not len(part):
                continue
            packed = (None,) * (self._count + 1) if self._packed is None else self._packed[index]
            hidden = swiglu(exact_matmul(part, gate_up[index], self._exact.operators, packed[0]))
            pieces = zip(shards, hidden.chunk(self._count, -1), down[index].chunk(self._count, 1), packed[1:])
            for shard, channels, matrix, kept in pieces:
                shard.append(exact_matmul(channels, matrix, self._exact.operators, kept))
        return sum_in_order([torch.cat(shard) for shard in shards], self._axis, scattered=False)


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
    if bank.activation != "silu" or bank.storage.stacked is not None or bank.scale_input:
        raise AdapterError(
            "exact mode does not support these experts (notimpl): got another activation than SwiGLU, stacked storage, "
            "or a scaled input. Leave out exact=True."
        )
    if context.layout.sequence_parallel and context.axis("tensor").size > 1:
        raise LayoutError(
            "exact mode does not support a mixture of experts with sequence parallel. Initialize the context without "
            "sequence_parallel."
        )
    products = ExactExpertProducts(experts, bank, context, exact)
    experts.products = products  # pyrefly: ignore  # checked above
    experts.pack = products.pack  # pyrefly: ignore  # called by a server after it has loaded the weights
