"""Megatron-Core's training engine: its DistributedDataParallel with FP32Optimizer or DistributedOptimizer (ZeRO-1).

Both wrap any module, and take an explicit collection of process groups.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from polyshard.adapters.megatron import compat
from polyshard.adapters.megatron.experts_compat import average_expert_gradients, mark_experts
from polyshard.adapters.megatron.model_groups import ModelGroups
from polyshard.adapters.megatron.optimizer import own_optimizer
from polyshard.adapters.megatron.pipeline import MegatronPipeline, hidden_dtype
from polyshard.adapters.megatron.pipeline_compat import process_groups
from polyshard.adapters.megatron.settings import check_loss_scale, check_precision, checked_ddp_options
from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.base_engine import BaseEngine
from polyshard.adapters.shared.expert_parameters import distributed_experts
from polyshard.adapters.shared.grad_norm import counted_parts
from polyshard.adapters.shared.parameter_groups import check_patterns
from polyshard.adapters.shared.tied_weights import copy_from_owners, sum_over_copies
from polyshard.adapters.shared.weights import load_shards
from polyshard.core.adapter import OptimizerFactory, StepResult
from polyshard.core.context import ParallelContext, holder_axis, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.parameter_groups import group_settings
from polyshard.core.pieces import MASTER, OptimizerState, Piece, replicated_piece
from polyshard.core.precision import Precision
from polyshard.core.stages import Stages
from polyshard.training.compile import Compile
from polyshard.training.pipeline_step import PipelineStep
from polyshard.training.recompute import Recompute
from polyshard.training.schedule import SchedulerFactory

logger = logging.getLogger(__name__)


class MegatronEngine(BaseEngine):
    """`TrainingEngine` on Megatron-Core over the replicas.

    Args:
        model: the unwrapped model that its factory built with `context`.
        optimizer: `polyshard.AdamW`, or at stage 0 `polyshard.TorchOptimizer(torch.optim.SGD, ...)`; Megatron
            creates its own optimizer from these settings.
        context: this process's parallel context, which this adapter initialized or adopted.
        zero_stage: 0 for FP32Optimizer, 1 for DistributedOptimizer.
        max_grad_norm: clip the whole model's gradient to this norm; None does not clip.
        precision: dtypes of the run. Parameters in bfloat16 or float16 get float32 masters; float16 scales the loss.
        recompute: activations that are recomputed in the backward pass: `"none"`, `"selective"`, `"full"`, or a
            function that chooses modules.
        scheduler: makes a scheduler of torch (`torch.optim.lr_scheduler`) from an optimizer. It advances with each
            update that is not skipped, and parameter groups scale its rate.
        compile: modules that torch.compile compiles: True for the blocks, or a function that chooses modules.
        check_random: compare random generators over the ranks before the first update, in one small all-reduce per axis
            of several ranks; see `polyshard.manual_seed`.
        ddp_options: fields of Megatron's DistributedDataParallelConfig: `overlap_grad_reduce`, `bucket_size` and
            `pad_buckets_for_high_nccl_busbw`.

    Raises:
        AdapterError: another optimizer.
        ConfigurationError: a stage, a precision or an option that the engine does not support.
    """

    _trains_distributed_experts = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        context: ParallelContext,
        *,
        zero_stage: int = 1,
        max_grad_norm: float | None = 1.0,
        check_random: bool = True,
        precision: Precision | None = None,
        recompute: Recompute = "none",
        scheduler: SchedulerFactory | None = None,
        compile: Compile = False,
        ddp_options: Mapping[str, Any] | None = None,
    ) -> None:
        if zero_stage not in (0, 1):
            raise ConfigurationError(f"zero_stage must be 0 or 1, got {zero_stage!r}")
        own = own_optimizer(optimizer, zero_stage)
        overlap = checked_ddp_options(ddp_options)
        super().__init__(
            model,
            context,
            max_grad_norm=max_grad_norm,
            check_random=check_random,
            precision=precision,
            recompute=recompute,
            scheduler=scheduler,
            compile=compile,
        )
        check_precision(self.precision)
        model, parameters = self._module, self.precision.parameters
        experts = distributed_experts(self.table, context)
        check_loss_scale(self.precision, experts)
        holders = context.axis("expert_replica") if experts else replica_axis(context)
        self._groups = ModelGroups.of(context)
        mark_experts(parameter for name, parameter in model.named_parameters() if name in experts)
        groups = process_groups(
            tensor=context.get_tensor_parallel_group(),
            data=replica_axis(context).group,
            pipeline=context.get_pipeline_parallel_group(),
            expert=context.get_expert_parallel_group(),
            expert_data=holders.group,
            groups=self._groups,
        )
        sharded = zero_stage == 1
        ddp_config = compat.DistributedDataParallelConfig(
            grad_reduce_in_fp32=self.precision.reduce == torch.float32,
            use_distributed_optimizer=sharded,
            **overlap,
        )
        settings = compat.OptimizerConfig(
            **own.fields,
            lr=own.lr,
            weight_decay=own.weight_decay,
            clip_grad=max_grad_norm or 0.0,
            params_dtype=parameters,
            bf16=parameters == torch.bfloat16,
            fp16=parameters == torch.float16,
            initial_loss_scale=self.precision.loss_scale,
            use_distributed_optimizer=sharded,
        )
        config = compat.layer_config(
            context.get_tensor_parallel_world_size(),
            context.layout.sequence_parallel,
            initialize=False,
            dtype=parameters,
        )
        check_patterns(optimizer, self.table, context)
        self._settings = {
            self.table[name].name: group_settings(self.table[name].name, parameter, own.groups, own.weight_decay)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        chosen = {p: self._settings.get(self.table[name].name) for name, p in model.named_parameters()}
        self._pipeline: MegatronPipeline | None = None
        if self._stages is not None:
            self._pipeline = self._start_pipeline(self._stages, config, groups)
        with self._guard("data parallel setup"), compat.cuda_as_cpu(self.context.device):
            wrap: Any = compat.DistributedDataParallel  # typed for TransformerConfig; layer_config suffices
            self._chunks: list[Any] = [
                wrap(config=config, ddp_config=ddp_config, module=module, pg_collection=groups)
                for module in ([model] if self._pipeline is None else self._pipeline.modules)
            ]
            for chunk in self._chunks:
                average_expert_gradients(chunk, holders.size)
            self._wrapped = self._chunks[0]
            self.optimizer = compat.get_megatron_optimizer(
                settings,
                self._chunks,
                config_overrides=compat.group_overrides(chosen, own.lr),
                use_gloo_process_groups=False,
                pg_collection=groups,
            )
        axis = context.axis("tensor")
        compat.skip_infinite_gradients(self.optimizer)
        compat.count_gradients(
            self.optimizer,
            {name: p for name, p in model.named_parameters() if name in self.model_weights.owned},
            lambda name, values, start: counted_parts(self.table[name], values, start, axis.rank, axis.size),
        )
        for group in self.optimizer.param_groups:
            # Megatron's OptimizerParamScheduler would do this; otherwise every group would have the same.
            group["weight_decay"] = group["start_wd"]
        self._start_rate(own.lr)
        self.zero_grad()

    def _start_pipeline(self, stages: Stages, config: Any, groups: Any) -> MegatronPipeline:
        """Prepare the stages for Megatron's schedules, before its buffers take the parameters."""
        parameters: dict[str, Any] = dict(stages.named_parameters())
        copy_from_owners(parameters, self.model_weights, self.context)
        for name in self.model_weights.holders.keys() & parameters.keys():
            # A bucket of its own: DistributedOptimizer then shards every copy in the same way.
            parameters[name].shared_embedding = True
        return MegatronPipeline(stages, self.context, config, groups, hidden_dtype(self.model_weights, self.context))

    _pipeline_has_fixed_shapes = False

    def _run_pipeline(self, step: PipelineStep, *, backward: bool) -> None:
        """Run Megatron's schedule; `step` of the engine averages the gradients over the replicas."""
        assert self._pipeline is not None
        scale = self._scaled if self.precision.scales_loss else None
        self._pipeline.run(self._chunks, step, backward=backward, scale=scale)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return self.optimizer.scale_loss(loss) if self.precision.scales_loss else loss

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients in Megatron's buffers (`main_grad`); `grad` stays None."""
        self._refuse_in_pipeline("the engine's backward pass")
        super().backward(self._scaled(loss))

    def step(self) -> StepResult:
        """Average the gradients over the replicas, clip, update, and clear them."""
        self.updates += 1
        with self._guard("data step"), compat.cuda_as_cpu(self.context.device):
            self._generators.compare()
            for chunk in self._chunks:
                chunk.finish_grad_sync()
            self._sum_tied_gradients()
            updated, norm, _ = self.optimizer.step()
        self.zero_grad()
        if not updated:
            self.updates -= 1  # counted above, since an error in the step may leave weights changed
            logger.warning("Megatron's optimizer skipped this step: a gradient is not finite")
        else:
            self._rate.updated()
        return StepResult(grad_norm=None if norm is None else float(norm), skipped=not updated)

    def zero_grad(self) -> None:
        """Clear accumulated gradients."""
        self._passes.note_step()
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches except the last."""
        self._refuse_in_pipeline("accumulate()")
        return self._wrapped.no_sync()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensor-parallel shards into the parameters and the optimizer's copies of them."""
        self.updates += 1
        if not self.precision.has_masters:
            load_shards(dict(self._module.named_parameters()), weights)
            with compat.cuda_as_cpu(self.context.device):
                self.optimizer.reload_model_params()
            return
        # Reloading would round the masters to the parameters: they get the values that were given.
        masters = {name: (main, start) for name, main, start in self._masters()}
        parameters = dict(self._module.named_parameters())
        for name, value in weights:
            load_shards(parameters, ((name, value),))
            if name in masters:
                main, start = masters[name]
                main.view(-1).copy_(value.to(main.device).reshape(-1)[start : start + main.numel()])

    def weights_written(self) -> None:
        """Refresh the optimizer's copies of the parameters."""
        self.updates += 1
        with compat.cuda_as_cpu(self.context.device):
            self.optimizer.reload_model_params()

    def optimizer_state(self) -> OptimizerState:
        """Return this rank's pieces of the optimizer state; at stage 0 every rank holds the full state."""
        pieces: list[Piece] = []
        bases = self._base_optimizers()
        for name, parameter in self._module.named_parameters():
            found = compat.optimizer_part(self.optimizer, parameter)
            if found is None:
                continue
            axis = holder_axis(self.context, self.table[name].layout)
            tensors: dict[str, torch.Tensor] = {}
            for base in bases:
                tensors |= optimizer_state.slots(base, found.main)
            if found.main.dtype != parameter.dtype:
                tensors[MASTER] = found.main.detach()
            for slot, value in tensors.items():
                if found.start is None:
                    pieces.append(replicated_piece(name, slot, value, axis))
                else:
                    pieces.append(Piece(parameter=name, slot=slot, start=found.start, values=value.view(-1)))
        return self._state(pieces)

    def close(self) -> None:
        """Release the wrappers and the process groups that the engine created."""
        super().close()
        self._groups.close()

    def _loss_scale_state(self) -> Mapping[str, float]:
        return compat.loss_scale_state(self.optimizer)

    def _load_loss_scale(self, saved: Mapping[str, float]) -> None:
        with compat.cuda_as_cpu(self.context.device):
            compat.load_loss_scale(self.optimizer, saved)

    def _sum_tied_gradients(self) -> None:
        parameters: dict[str, Any] = dict(self._module.named_parameters())
        gradients = {name: p.main_grad for name, p in parameters.items() if p.requires_grad}
        sum_over_copies(gradients, self.model_weights, self.context)

    def _masters(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Yield this rank's part of each master: name, values, and the position of the first in the shard."""
        for name, parameter in self._module.named_parameters():
            part = compat.optimizer_part(self.optimizer, parameter)
            if part is not None and part.main.dtype != parameter.dtype:
                yield name, part.main.detach(), part.start or 0

    def _base_optimizers(self) -> list[Any]:
        return compat.base_optimizers(self.optimizer)
