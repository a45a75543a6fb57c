"""Megatron-Core's training engine: its DistributedDataParallel with FP32Optimizer or DistributedOptimizer (ZeRO-1).

Both wrap any module, and take an explicit collection of process groups.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polyshard.adapters.megatron import compat
from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.base_engine import BaseEngine
from polyshard.adapters.shared.library_norm import prepare_for_library_norm
from polyshard.adapters.shared.weights import load_shards
from polyshard.core.adapter import AdamW, OptimizerFactory, StepResult
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import AdapterError, ConfigurationError
from polyshard.core.pieces import MASTER, OptimizerState, Piece, held_alike

logger = logging.getLogger(__name__)


class MegatronEngine(BaseEngine):
    """`TrainingEngine` on Megatron-Core over the replicas.

    Args:
        model: the unwrapped model that its factory built with `context`.
        optimizer: `polyshard.AdamW`; Megatron creates its own optimizer from these settings.
        context: this process's parallel context, which this adapter initialized or adopted.
        zero_stage: 0 for FP32Optimizer, 1 for DistributedOptimizer.
        max_grad_norm: maximum norm of the gradient of the full model; None disables clipping.
        check_random: compare random generators over the ranks before the first update, in one small all-reduce per axis
            of several ranks; see `polyshard.manual_seed`.

    Raises:
        AdapterError: `optimizer` is of another type, or tensor-parallel ranks share KV heads and clipping is requested.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        context: ParallelContext,
        *,
        zero_stage: int = 1,
        max_grad_norm: float | None = 1.0,
        check_random: bool = True,
    ) -> None:
        if zero_stage not in (0, 1):
            raise ConfigurationError(f"zero_stage must be 0 or 1, got {zero_stage!r}")
        if not isinstance(optimizer, AdamW):
            raise AdapterError(
                f"Megatron creates its own optimizer: got {type(optimizer).__name__}, expected polyshard.AdamW(...)"
            )
        super().__init__(model, context, max_grad_norm=max_grad_norm, check_random=check_random)
        prepare_for_library_norm(model, self.table, context, "Megatron", max_grad_norm is not None)
        groups = compat.process_groups(
            context.get_tensor_parallel_group(),
            replica_axis(context).group,
            context.get_pipeline_parallel_group(),
            dist.group.WORLD,
        )
        sharded = zero_stage == 1
        ddp_config = compat.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=sharded
        )
        settings = compat.OptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            clip_grad=max_grad_norm or 0.0,
            params_dtype=torch.get_default_dtype(),
            use_distributed_optimizer=sharded,
        )
        config = compat.layer_config(
            context.get_tensor_parallel_world_size(), context.layout.sequence_parallel, initialize=False
        )
        with self._guard("data parallel setup"), compat.cuda_as_cpu(self.context.device):
            wrap: Any = compat.DistributedDataParallel  # typed for TransformerConfig; layer_config suffices
            self._wrapped = wrap(config=config, ddp_config=ddp_config, module=model, pg_collection=groups)
            self.optimizer = compat.get_megatron_optimizer(
                settings, [self._wrapped], use_gloo_process_groups=False, pg_collection=groups
            )
        for group in self.optimizer.param_groups:
            # Megatron's OptimizerParamScheduler would do this; otherwise norms and biases would also be decayed.
            group["weight_decay"] = optimizer.weight_decay * group.get("wd_mult", 1.0)
        self.zero_grad()

    def step(self) -> StepResult:
        """Average the gradients over the replicas, clip, update, and clear them."""
        self.updates += 1
        with self._guard("data step"), compat.cuda_as_cpu(self.context.device):
            self._generators.compare()
            self._wrapped.finish_grad_sync()
            updated, norm, _ = self.optimizer.step()
        self.zero_grad()
        if not updated:
            self.updates -= 1  # counted above, since an error in the step may leave weights changed
            logger.warning("Megatron's optimizer skipped this step: a gradient is not finite")
        return StepResult(grad_norm=None if norm is None else float(norm), skipped=not updated)

    def zero_grad(self) -> None:
        """Clear accumulated gradients."""
        self._wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches except the last."""
        return self._wrapped.no_sync()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensor-parallel shards into the parameters and the optimizer's copies of them."""
        self.updates += 1
        load_shards(dict(self._module.named_parameters()), weights)
        with compat.cuda_as_cpu(self.context.device):
            self.optimizer.reload_model_params()

    def weights_written(self) -> None:
        """Refresh the optimizer's copies of the parameters."""
        self.updates += 1
        with compat.cuda_as_cpu(self.context.device):
            self.optimizer.reload_model_params()

    def optimizer_state(self) -> OptimizerState:
        """Return this rank's pieces of the optimizer state; at stage 0 every rank holds the full state."""
        axis = replica_axis(self.context)
        pieces: list[Piece] = []
        base = compat.base_optimizer(self.optimizer)
        for name, parameter in self._module.named_parameters():
            found = compat.optimizer_part(self.optimizer, base, parameter)
            if found is None:
                continue
            tensors = optimizer_state.slots(base, found.main)
            if found.main.dtype != parameter.dtype:
                tensors[MASTER] = found.main.detach()
            for slot, value in tensors.items():
                if found.start is None:
                    pieces.append(held_alike(name, slot, value, axis))
                else:
                    pieces.append(Piece(parameter=name, slot=slot, start=found.start, values=value.view(-1)))
        return optimizer_state.state(base, self.optimizer, pieces)

    def _base_optimizer(self) -> Any:
        return compat.base_optimizer(self.optimizer)
