"""The training engine on FairScale: OSS (ZeRO-1) with torch's DDP, or OSS with ShardedDataParallel (ZeRO-2)."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polyshard.adapters.fairscale.compat import OSS, sharded_data_parallel
from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.base_engine import BaseEngine
from polyshard.adapters.shared.grad_norm import clip_factor, counted_square
from polyshard.adapters.shared.weights import load_shards
from polyshard.core.adapter import OptimizerFactory, StepResult
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.pieces import OptimizerState, Piece

logger = logging.getLogger(__name__)


class FairscaleEngine(BaseEngine):
    """`TrainingEngine` on FairScale over the replicas.

    Args:
        model: the unwrapped model that its factory built with `context`.
        optimizer: creates an optimizer whose class, groups and settings are passed to OSS for this rank's shard.
        context: this process's parallel context.
        zero_stage: 1 for OSS with torch's DDP, 2 for OSS with ShardedDataParallel.
        max_grad_norm: maximum norm of the gradient of the full model; None disables clipping.
        check_random: compare random generators over the ranks before the first update, in one small all-reduce per axis
            of several ranks; see `polyshard.manual_seed`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        context: ParallelContext,
        *,
        zero_stage: int = 2,
        max_grad_norm: float | None = 1.0,
        check_random: bool = True,
    ) -> None:
        if zero_stage not in (1, 2):
            raise ConfigurationError(
                f"zero_stage must be 1 (OSS with DDP) or 2 (OSS with ShardedDDP), got {zero_stage!r}"
            )
        super().__init__(model, context, max_grad_norm=max_grad_norm, check_random=check_random)
        template = optimizer(model.named_parameters())
        group = replica_axis(context).group
        optimizer_class: Any = type(template)
        accepted = inspect.signature(optimizer_class).parameters  # defaults contain more than these
        settings = {name: value for name, value in template.defaults.items() if name in accepted}
        self.optimizer = OSS(template.param_groups, optim=optimizer_class, group=group, **settings)
        # In stage 2 only the rank that owns the optimizer state of a parameter keeps its gradient.
        self._owned_only = zero_stage == 2 and replica_axis(context).size > 1
        with self._guard("data parallel setup"):
            self._wrapped = (
                sharded_data_parallel(model, self.optimizer, group)
                if zero_stage == 2
                else DistributedDataParallel(model, process_group=group)
            )

    def step(self) -> StepResult:
        """Clip, update, and clear the gradients; a gradient that is not finite skips the update with a warning."""
        with self._guard("data step"):
            self._generators.compare()
            norm = self._grad_norm()
            value = float(norm)
            finite = math.isfinite(value)
            if finite:
                self.updates += 1  # before the update, since an error in it may leave weights changed
                if self._max_grad_norm is not None:
                    factor = clip_factor(norm, self._max_grad_norm)
                    for parameter in self._module.parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(factor)
                self.optimizer.step()
            else:
                logger.warning("gradient norm is %s: this step is skipped", value)
        self.zero_grad()
        return StepResult(grad_norm=value, skipped=not finite)

    def zero_grad(self) -> None:
        """Clear accumulated gradients."""
        self._wrapped.zero_grad(set_to_none=True)

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches except the last."""
        return self._wrapped.no_sync()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensor-parallel shards into the parameters."""
        self.updates += 1
        load_shards(dict(self._module.named_parameters()), weights)

    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer state on this rank: OSS keeps a parameter's full state on the rank that owns it."""
        inner = self.optimizer.optim
        optimizer_state.materialize(inner)
        pieces = [
            Piece(parameter=name, slot=slot, start=0, values=value.view(-1))
            for name, parameter in self._module.named_parameters()
            for slot, value in optimizer_state.slots(inner, parameter).items()
        ]
        return optimizer_state.state(inner, self.optimizer, pieces)

    def _base_optimizer(self) -> Any:
        return self.optimizer.optim

    def _grad_norm(self) -> torch.Tensor:
        tensor_axis, replicas = self.context.axis("tensor"), replica_axis(self.context)
        total = torch.zeros((), device=self.context.device)
        owner = self.optimizer._param_to_rank if self._owned_only else None
        for name, parameter in self._module.named_parameters():
            if parameter.grad is None or (owner is not None and owner[parameter] != replicas.rank):
                continue
            total = total + counted_square(parameter.grad, self.table[name].layout, tensor_axis.rank, tensor_axis.size)
        if tensor_axis.size > 1:
            assert tensor_axis.collectives is not None
            total = tensor_axis.collectives.all_reduce(total)
        if self._owned_only:
            assert replicas.collectives is not None
            total = replicas.collectives.all_reduce(total)
        return total.sqrt()
