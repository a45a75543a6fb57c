"""The training engine on FairScale: OSS (ZeRO-1) with torch's DDP, or OSS with ShardedDataParallel (ZeRO-2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polyshard.adapters.fairscale.adapter import CAPABILITIES
from polyshard.adapters.fairscale.compat import remove_hooks, sharded_data_parallel, sharded_options
from polyshard.adapters.fairscale.optimizers import ShardedOptimizers
from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.base_engine import BaseEngine
from polyshard.adapters.shared.expert_gradients import ExpertGradients, group_of_each, ignore_in_ddp
from polyshard.adapters.shared.expert_parameters import distributed_experts
from polyshard.adapters.shared.grad_norm import counted_square, over_stages
from polyshard.adapters.shared.masters import Masters, broadcast_parameters
from polyshard.adapters.shared.options import ddp_options as checked_ddp_options
from polyshard.adapters.shared.pipeline_training import PipelineTraining
from polyshard.adapters.shared.reducer import GradientReducer
from polyshard.adapters.shared.weights import load_shards
from polyshard.core.adapter import OptimizerFactory, StepResult
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.pieces import MASTER, OptimizerState, Piece
from polyshard.core.precision import Precision
from polyshard.core.stages import Stages
from polyshard.training.compile import Compile
from polyshard.training.pipeline_step import PipelineStep
from polyshard.training.recompute import Recompute
from polyshard.training.schedule import SchedulerFactory


class FairscaleEngine(BaseEngine):
    """`TrainingEngine` on FairScale over the replicas.

    Args:
        model: the unwrapped model that its factory built with `context`.
        optimizer: creates an optimizer whose class, groups and settings are passed to OSS for this rank's shard.
        context: this process's parallel context.
        zero_stage: 1 for OSS with torch's DDP, 2 for OSS with ShardedDataParallel. Default 2, and 1 in a pipeline,
            whose stages run on torch's schedules.
        max_grad_norm: clip the whole model's gradient to this norm; None does not clip.
        precision: dtypes of the run. Float32 parameters are cast by autocast; bfloat16 parameters get float32 masters,
            and their gradients are reduced in bfloat16.
        recompute: activations that are recomputed in the backward pass: `"none"`, `"selective"`, `"full"`, or a
            function that chooses modules.
        scheduler: makes a scheduler of torch (`torch.optim.lr_scheduler`) from an optimizer. It advances with each
            update that is not skipped, and parameter groups scale its rate.
        compile: modules that torch.compile compiles: True for the blocks, or a function that chooses modules.
        check_random: compare random generators over the ranks before the first update, in one small all-reduce per axis
            of several ranks; see `polyshard.manual_seed`.
        ddp_options: arguments of torch's DistributedDataParallel at stage 1, of ShardedDataParallel at stage 2, such as
            `reduce_buffer_size`.
    """

    _trains_distributed_experts = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        context: ParallelContext,
        *,
        zero_stage: int | None = None,
        max_grad_norm: float | None = 1.0,
        check_random: bool = True,
        precision: Precision | None = None,
        recompute: Recompute = "none",
        scheduler: SchedulerFactory | None = None,
        compile: Compile = False,
        ddp_options: Mapping[str, Any] | None = None,
    ) -> None:
        staged = context.axis("pipeline").size > 1
        zero_stage = (1 if staged else 2) if zero_stage is None else zero_stage
        if zero_stage not in (1, 2):
            raise ConfigurationError(
                f"zero_stage must be 1 (OSS with DDP) or 2 (OSS with ShardedDDP), got {zero_stage!r}"
            )
        if staged and (zero_stage == 2 or ddp_options is not None):
            raise ConfigurationError(
                "zero_stage=2 and ddp_options are unsupported in a pipeline: ShardedDDP and DDP would reduce gradients "
                "after each micro-batch. Use zero_stage=1 without ddp_options."
            )
        ddp = sharded_options(ddp_options) if zero_stage == 2 else checked_ddp_options(ddp_options)
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
        _check_precision(self.precision)
        model = self._module
        template = self._build(optimizer, model.named_parameters(), held="whole")
        group = replica_axis(context).group
        self._distributed = distributed_experts(self.table, context)
        experts = [p for name, p in model.named_parameters() if name in self._distributed and p.requires_grad]
        holders = context.axis("expert_replica")
        self.optimizer = ShardedOptimizers(template, self.precision, group, experts, holders.group)
        self._start_rate()
        # In stage 2 only the rank that owns the optimizer state of a parameter keeps its gradient.
        dense = self.optimizer.dense is not None
        self._owned_only = zero_stage == 2 and replica_axis(context).size > 1 and dense
        self._reducer: GradientReducer | None = None  # of a pipeline
        self._pipeline = None if self._stages is None else self._start_pipeline(self._stages, recompute)
        self._syncs = True  # False while all but the last micro-batch accumulate
        with self._guard("data parallel setup"):
            self._experts = ExpertGradients(model.named_parameters(), self._distributed, holders, self._guard)
            if self._pipeline is None:
                self._wrapped = self._data_parallel(model, zero_stage, ddp)

    def _data_parallel(self, model: nn.Module, zero_stage: int, options: dict[str, Any]) -> Any:
        """Wrap the model, without distributed experts, whose gradients `ExpertGradients` averages."""
        replicas = replica_axis(self.context)
        if self.optimizer.dense is None:  # experts alone are trained, and the wrappers would refuse the model
            broadcast_parameters(model, replicas.group, replicas.ranks, without=self._distributed)
            return model
        if zero_stage == 2:
            if self._distributed:  # the wrapper would send the first replica's experts to all
                broadcast_parameters(model, replicas.group, replicas.ranks, without=self._distributed)
            return sharded_data_parallel(
                model, self.optimizer.dense, replicas.group, options, sync_models=not self._distributed
            )
        if self._distributed:
            ignore_in_ddp(model, self._distributed)
        # Without views, gradients lie beside DDP's buckets of the same size.
        options = {"gradient_as_bucket_view": True, **options}
        return DistributedDataParallel(model, process_group=replicas.group, **options)

    def _start_pipeline(self, stages: Stages, recompute: Recompute) -> PipelineTraining:
        replicas = replica_axis(self.context)
        with self._guard("data parallel setup"):
            broadcast_parameters(self._module, replicas.group, replicas.ranks, without=self._distributed)
        # Each parameter stands for itself: OSS keeps the masters of narrow ones.
        own = Masters(self._module.named_parameters(), self.precision.parameters)
        groups = group_of_each(self.table, self.context)
        self._reducer = reducer = GradientReducer(self._module.named_parameters(), own, self.precision.reduce, groups)
        return PipelineTraining(
            stages,
            self.model_weights,
            self.context,
            self._module.named_parameters,
            scaled=self._scaled,
            recompute=recompute,
            reducer=reducer,
        )

    def _run_pipeline(self, step: PipelineStep, *, backward: bool) -> None:
        assert self._pipeline is not None
        self._pipeline.run(step, backward=backward)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients, averaged over the replicas."""
        if self._wrapped is not self._module and replica_axis(self.context).size > 1:
            self._passes.check_wrapper(type(self._wrapped).__name__)
            if self._owned_only:
                self._passes.check_step("ShardedDataParallel")
        super().backward(self._scaled(loss))
        if self._distributed and self._syncs:
            self._experts.average()

    def step(self) -> StepResult:
        """Clip, update, and clear the gradients; a gradient that is not finite skips the update with a warning."""
        with self._guard("data step"):
            self._generators.compare()
            norm = self._grad_norm()
            return self._update_if_finite(norm, self._module.parameters())

    def zero_grad(self) -> None:
        """Clear accumulated gradients."""
        self._passes.note_step()
        self._wrapped.zero_grad(set_to_none=True)  # the stages themselves in a pipeline
        for name, parameter in self._module.named_parameters():
            if name in self._distributed:  # ShardedDataParallel clears its own
                parameter.grad = None

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches except the last."""
        self._refuse_in_pipeline("accumulate()")
        return self._without_sync()

    @property
    def _averages(self) -> bool:
        return self._syncs

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        self._syncs = False
        try:
            with nullcontext() if self._wrapped is self._module else self._wrapped.no_sync():
                yield
        finally:
            self._syncs = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensor-parallel shards into the parameters."""
        self.updates += 1
        masters, parameters = self.optimizer.masters, dict(self._module.named_parameters())
        for name, value in weights:
            load_shards(parameters, ((name, value),))
            if parameters[name] in masters:
                with torch.no_grad():
                    masters[parameters[name]].copy_(value)

    def weights_written(self) -> None:
        """Count the update, and refresh the masters."""
        self.updates += 1
        self.optimizer.read_parameters()

    def optimizer_written(self, state: OptimizerState) -> None:
        """Continue from a saved state; the parameters are the masters, rounded, on every rank."""
        super().optimizer_written(state)
        self.optimizer.write_parameters()

    def optimizer_state(self) -> OptimizerState:
        """OSS keeps the state of whole parameters, each on the rank that owns it."""
        bases, masters = self._base_optimizers(), self.optimizer.masters
        for base in bases:
            optimizer_state.materialize(base)
        pieces: list[Piece] = []
        for name, parameter in self._module.named_parameters():
            updated = masters.get(parameter, parameter)
            tensors: dict[str, torch.Tensor] = {}
            for base in bases:
                tensors |= optimizer_state.slots(base, updated)
            if updated is not parameter:
                tensors[MASTER] = updated.detach()
            pieces += [Piece(parameter=name, slot=s, start=0, values=value.view(-1)) for s, value in tensors.items()]
        return self._state(pieces)

    def close(self) -> None:
        """Release the wrapper, and stop taking gradients."""
        if self._reducer is not None:
            self._reducer.close()
        if self._owned_only and self._wrapped is not self._module:
            remove_hooks(self._wrapped)
        super().close()

    def _base_optimizers(self) -> list[Any]:
        return self.optimizer.bases

    def _grad_norm(self) -> torch.Tensor:
        axis, replicas, expert_axis = (
            self.context.axis("tensor"),
            replica_axis(self.context),
            self.context.axis("expert"),
        )
        total, experts = torch.zeros(2, device=self.context.device).unbind(0)
        owner = self.optimizer.dense._param_to_rank if self._owned_only else None
        for name, parameter in self._module.named_parameters():
            if parameter.grad is None or name not in self.model_weights.owned:
                continue
            square = counted_square(parameter.grad, self.table[name].layout, axis.rank, axis.size)
            if name in self._distributed:
                experts = experts + square
            elif owner is None or owner[parameter] == replicas.rank:
                total = total + square
        if self._owned_only:
            assert replicas.collectives is not None
            total = replicas.collectives.all_reduce(total)
        if self._distributed:
            assert expert_axis.collectives is not None
            total = total + expert_axis.collectives.all_reduce(experts)
        if axis.size > 1:
            assert axis.collectives is not None
            total = axis.collectives.all_reduce(total)
        return over_stages(total, self.context).sqrt()


def _check_precision(precision: Precision) -> None:
    if precision.float8 is not None:
        CAPABILITIES.require("float8")
    if precision.parameters == torch.float16:
        raise ConfigurationError(
            "float16 parameters are unsupported with FairScale: torch refuses to unscale their gradients. Build the "
            "model in float32, and pass precision=Precision(compute=torch.float16)."
        )
    if precision.reduce != precision.parameters:
        raise ConfigurationError(
            f"FairScale reduces gradients in the dtype of the parameters: got reduce={precision.reduce}, expected "
            f"{precision.parameters}. Pass precision=Precision(parameters={precision.parameters}, "
            f"reduce={precision.parameters})."
        )
