"""A mixture-of-experts layer on the meta device: the shapes, FLOPs and messages of balanced, dropless experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.errors import LayoutError
from polyshard.core.weight_table import collect_layouts
from polyshard.layers.activation import swiglu
from polyshard.layers.differentiable import copy_to_region, gather_sequence, reduce_from_region, scatter_sum_sequence


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are distributed over the expert axis."""
    parameters = dict(model.named_parameters())
    for name, entry in collect_layouts(model).items():
        if getattr(entry.layout, "experts", None) is not None:  # a layout with an expert axis
            yield parameters[name]
    for module in model.modules():
        if isinstance(module, PlannedExperts):
            yield from (module.gate_up, module.down)


class PlannedExperts(nn.Module):
    """Routed experts with equal loads. It has shapes only and cannot be trained.

    Experts are distributed over the expert axis, and the intermediate size of each over the tensor axis.

    Args:
        hidden_size: size of the hidden states.
        intermediate_size: of one expert.
        experts: number of experts.
        chosen: experts for each token.
        context: on the meta device.

    Raises:
        LayoutError: experts or sizes cannot be divided.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, experts: int, chosen: int, context: ParallelContext
    ) -> None:
        super().__init__()
        self.axis, self.tensor = context.axis("expert"), context.axis("tensor")
        if experts % self.axis.size:
            raise LayoutError(f"{experts} experts cannot be divided by expert-parallel size {self.axis.size}")
        if intermediate_size % self.tensor.size:
            raise LayoutError(
                f"the intermediate size {intermediate_size} of an expert cannot be divided by tensor-parallel size "
                f"{self.tensor.size}"
            )
        self.chosen, self.sequence_parallel = chosen, context.layout.sequence_parallel
        self.local, inner = experts // self.axis.size, intermediate_size // self.tensor.size
        self.router = nn.Linear(hidden_size, experts, bias=False, device=context.device)
        self.gate_up = nn.Parameter(torch.empty(self.local, hidden_size, 2 * inner, device=context.device))
        self.down = nn.Parameter(torch.empty(self.local, inner, hidden_size, device=context.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., hidden]`, the shape of the input."""
        x = gather_sequence(x, self.tensor) if self.sequence_parallel else copy_to_region(x, self.tensor)
        tokens = x.reshape(-1, x.shape[-1])
        weights, indices = self.router(tokens).float().softmax(-1).topk(self.chosen, dim=-1)
        rows = tokens.index_select(0, indices.flatten() // self.chosen)
        padding = -len(rows) % (self.local * self.axis.size)
        sent = _exchange(F.pad(rows, (0, 0, 0, padding)), self.axis).view(self.local, -1, x.shape[-1])
        done = torch.bmm(swiglu(torch.bmm(sent, self.gate_up)), self.down)
        back = _exchange(done.flatten(0, 1), self.axis)[: len(rows)]
        mixed = (back.view(*indices.shape, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1).view_as(x)
        return (
            scatter_sum_sequence(mixed, self.tensor)
            if self.sequence_parallel
            else reduce_from_region(mixed, self.tensor)
        )


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
        ctx.axis, exchange = axis, axis.collectives
        return exchange.all_to_all(x.unflatten(0, (axis.size, -1))).flatten(0, 1)  # pyrefly: ignore

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradients[0], ctx.axis), None


def _exchange(x: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    return x if axis.size == 1 else _AllToAll.apply(x, axis)
