"""Data parallelism of experts: gradients are averaged over the ranks that hold the same experts, and over no others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polyshard.core.context import FailureGuard, ParallelAxis, ParallelContext, holder_axis
from polyshard.core.weight_table import WeightTable


def group_of_each(table: WeightTable, context: ParallelContext) -> Mapping[str, dist.ProcessGroup | None]:
    """Return the group of the ranks that hold the same shard of each parameter; None for a single rank."""
    return {name: holder_axis(context, entry.layout).group for name, entry in table.items()}


def ignore_in_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Exclude parameters from the DistributedDataParallel that is built next."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


class ExpertGradients:
    """Averages the gradients of experts beside DistributedDataParallel, which ignores them.

    Args:
        named_parameters: of the model.
        names: of the parameters that are distributed over the expert axis.
        axis: the ranks that hold the same experts.
        guard: names the rank at fault.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        names: frozenset[str],
        axis: ParallelAxis,
        guard: FailureGuard,
    ) -> None:
        self._parameters = [parameter for name, parameter in named_parameters if name in names]
        self._axis, self._guard = axis, guard
        if axis.size > 1:
            for parameter in self._parameters:  # as DistributedDataParallel does with the others when it is built
                dist.broadcast(parameter.detach(), src=axis.ranks[0], group=axis.group)

    @torch.no_grad()
    def average(self) -> None:
        """Average all gradients, in one message of each dtype. A parameter without a gradient counts as zero."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        if self._axis.size == 1 or not trained:
            return
        for dtype in sorted({parameter.dtype for parameter in trained}, key=str):
            same = [parameter for parameter in trained if parameter.dtype == dtype]
            for parameter in same:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            message = torch.cat([p.grad.reshape(-1) for p in same if p.grad is not None])
            with self._guard("expert_replica all_reduce"):
                dist.all_reduce(message, group=self._axis.group)
            parts = message.div_(self._axis.size).split([parameter.numel() for parameter in same])
            for parameter, part in zip(same, parts):
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view_as(parameter))
