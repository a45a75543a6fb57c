"""The experts of an engine that are distributed over the expert axis."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from polyshard.adapters.deepspeed.experts_compat import marked_as_experts, set_expert_groups, split_groups
from polyshard.adapters.deepspeed.settings import check_experts
from polyshard.adapters.shared.expert_parameters import distributed_experts
from polyshard.core.context import ParallelContext
from polyshard.core.weight_table import WeightTable


class ExpertTraining:
    """Lets DeepSpeed's engine train experts; without distributed ones it changes nothing.

    Args:
        model: of the engine.
        table: its weight table.
        context: the parallel context.
        stage: the ZeRO stage.

    Raises:
        ConfigurationError: DeepSpeed cannot train them at this stage; or the context is of another adapter, and has no
            group of the ranks that hold the same experts.
    """

    def __init__(self, model: nn.Module, table: WeightTable, context: ParallelContext, stage: int) -> None:
        names, size = distributed_experts(table, context), context.axis("expert").size
        check_experts(stage, names)
        self._size = size
        self._experts = [parameter for name, parameter in model.named_parameters() if name in names]
        self._forget_groups = set_expert_groups(context) if names else None
        # DeepSpeed divides the summed gradients of experts by the number of all replicas (engine.py and
        # stage_1_and_2.py, 0.19.8), and polyshard's experts theirs by the size of the expert axis.
        trained = [parameter for parameter in self._experts if parameter.requires_grad]
        self._hooks = [parameter.register_hook(lambda gradient: gradient * size) for parameter in trained]

    def split(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Give experts parameter groups of their own, and return the optimizer."""
        split_groups(optimizer, self._experts, self._size)
        return optimizer

    def marked(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Return a context manager in which DeepSpeed's engine is built around the model, or around its pipeline."""
        return marked_as_experts(wrapped, self._experts, self._size)

    def close(self) -> None:
        """Restore the gradients of the model, and DeepSpeed's process groups."""
        for hook in self._hooks:
            hook.remove()
        if self._forget_groups is not None:
            self._forget_groups()
