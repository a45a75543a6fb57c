"""The training engine on torch's DistributedDataParallel or FSDP2 (`fully_shard`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.base_engine import BaseEngine
from polyshard.adapters.shared.expert_gradients import ExpertGradients, group_of_each, ignore_in_ddp
from polyshard.adapters.shared.expert_parameters import distributed_experts
from polyshard.adapters.shared.masters import Masters, broadcast_parameters
from polyshard.adapters.shared.offload import Offload, check_offload
from polyshard.adapters.shared.pipeline_training import PipelineTraining
from polyshard.adapters.shared.reducer import GradientReducer
from polyshard.adapters.shared.weights import check_shard
from polyshard.adapters.torch.clip import global_grad_norm
from polyshard.adapters.torch.compat import (
    drop_accumulated_gradients,
    full_tensor,
    is_dtensor,
    local_tensor,
    reshard,
    sharded_rows,
    unshard_gradient_sync,
)
from polyshard.adapters.torch.float8 import apply_float8
from polyshard.adapters.torch.overlap import overlap_options, reducer_options
from polyshard.adapters.torch.sharding import (
    fully_shard_model,
    fully_shard_stages,
    is_list_item,
    separate_dtensors,
)
from polyshard.core.adapter import OptimizerFactory, StepResult
from polyshard.core.context import ParallelContext, holder_axis, replica_axis
from polyshard.core.engine_copies import Held
from polyshard.core.errors import ConfigurationError
from polyshard.core.pieces import MASTER, WEIGHT, OptimizerState, Piece, replicated_piece
from polyshard.core.precision import Precision
from polyshard.training.compile import Compile
from polyshard.training.pipeline_step import PipelineStep
from polyshard.training.recompute import Recompute
from polyshard.training.schedule import SchedulerFactory

logger = logging.getLogger(__name__)


class TorchEngine(BaseEngine):
    """`TrainingEngine` on DDP or FSDP2 over the replicas; tensor parallelism is implemented by the model's layers.

    Args:
        model: the unwrapped model that its factory built with `context`.
        optimizer: creates the optimizer from the named parameters of the wrapped model.
        context: this process's parallel context.
        data_parallel: `"ddp"` (replicated) or `"fsdp"` (parameters, gradients and optimizer states sharded).
        max_grad_norm: maximum norm of the gradient of the full model; None disables clipping.
        check_random: compare random generators over the ranks before the first update, in one small all-reduce per axis
            of several ranks; see `polyshard.manual_seed`.
        precision: dtypes of the run. Float32 parameters with a narrower `compute` are cast by autocast under `"ddp"`
            and by FSDP2's own policy under `"fsdp"`; narrower parameters get masters, under `"ddp"` only. `float8` is
            computed by torchao, in all `ps.column_parallel`, `ps.row_parallel` and `ps.qkv_parallel` layers.
        recompute: activations that are recomputed in the backward pass: `"none"`, `"selective"`, `"full"`, or a
            function that chooses modules.
        scheduler: makes a scheduler of torch (`torch.optim.lr_scheduler`) from an optimizer. It advances with each
            update that is not skipped, and parameter groups scale its rate.
        offload: `"optimizer"` keeps FSDP2's shards of parameters, gradients and optimizer state on the CPU, and updates
            them there. It has run on CPU ranks only.
        compile: modules that torch.compile compiles: True for the blocks, or a function that chooses modules.
        shard_modules: for FSDP2, selects the modules that are gathered one at a time; by default the items of every
            ModuleList.
        ddp_options: arguments of DistributedDataParallel, such as `bucket_cap_mb` and `static_graph`. With masters only
            `bucket_cap_mb`.
        fsdp_options: `reshard_after_forward`, `forward_prefetch` and `backward_prefetch`; see `FsdpOptions`.

    Raises:
        ConfigurationError: `data_parallel` is unknown, the norm is not positive, or the precision is unsupported.

    Examples:
        >>> context = ps.initialize("torch")
        >>> engine = TorchEngine(ps.column_parallel(4, 2, context), ps.AdamW(lr=0.1), context, max_grad_norm=1.0)
        >>> engine.backward(engine(torch.ones(1, 4)).sum())
        >>> engine.step().grad_norm > 0, engine.updates
        (True, 1)
    """

    _trains_distributed_experts = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerFactory,
        context: ParallelContext,
        *,
        data_parallel: Literal["ddp", "fsdp"] = "ddp",
        max_grad_norm: float | None = 1.0,
        check_random: bool = True,
        precision: Precision | None = None,
        recompute: Recompute = "none",
        scheduler: SchedulerFactory | None = None,
        offload: Offload = "none",
        compile: Compile = False,
        shard_modules: Callable[[nn.Module], bool] | None = None,
        ddp_options: Mapping[str, Any] | None = None,
        fsdp_options: Mapping[str, Any] | None = None,
    ) -> None:
        if data_parallel not in ("ddp", "fsdp"):
            raise ConfigurationError(f"data_parallel must be 'ddp' or 'fsdp', got {data_parallel!r}")
        ddp, fsdp = overlap_options(data_parallel, ddp_options, fsdp_options)
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
        model, replicas = self._module, replica_axis(context)
        self._sharded = data_parallel == "fsdp" and replicas.size > 1
        self._masters: Masters | None = None
        self._reducer: GradientReducer | None = None
        self._pipeline: PipelineTraining | None = None
        self._experts: ExpertGradients | None = None  # beside DistributedDataParallel
        experts = distributed_experts(self.table, context)
        # DDP's static graph fails if its first backward pass is under no_sync (reducer.cpp:1732, torch 2.13).
        self._skips_sync = not ddp.get("static_graph", False)
        self._check_precision()
        self._undo_float8 = apply_float8(model, self.precision.float8, context)
        if experts and offload != "none":
            raise ConfigurationError(
                f"offload={offload!r} is unsupported with expert parallel: the experts' optimizer state would stay on "
                "the device. Use an expert-parallel size of 1, or no offload."
            )
        offloads = check_offload(offload, context.device, self._sharded, "data_parallel='fsdp' with several replicas")
        if data_parallel == "fsdp" and not self._sharded:
            logger.warning("fsdp does nothing at data-parallel size 1: the model is trained unsharded")
        of_experts = {parameter for name, parameter in model.named_parameters() if name in experts}
        # DistributedDataParallel refuses a model without a parameter of its own.
        experts_only = bool(experts) and not any(p.requires_grad and p not in of_experts for p in model.parameters())
        if self._sharded and self._stages is None:
            chosen = shard_modules or is_list_item(model)
            fully_shard_model(model, context, chosen, self.precision, fsdp, offloads, of_experts)
        elif not self._sharded and (self._stages is not None or self.precision.has_masters or experts_only):
            self._start_reducer(ddp_options)
        elif not self._sharded and replicas.size > 1:
            with self._guard("data parallel setup"):
                if experts:
                    self._experts = ExpertGradients(
                        model.named_parameters(), experts, context.axis("expert_replica"), self._guard
                    )
                    ignore_in_ddp(model, experts)
                self._wrapped = DistributedDataParallel(model, process_group=replicas.group, **ddp)
        if self._stages is not None:
            self._pipeline = PipelineTraining(
                self._stages,
                self.model_weights,
                context,
                self._updated,
                scaled=self._scaled,
                recompute=recompute,
                reducer=self._reducer,
                local=local_tensor,
            )
            if self._sharded:
                modules = self._pipeline.modules
                fully_shard_stages(
                    self._stages, modules, context, shard_modules, self.precision, fsdp, offloads, of_experts
                )
        self.optimizer = self._build(optimizer, self._updated(), held="rows" if self._sharded else "whole")
        if self._sharded:
            separate_dtensors(self.optimizer)
        self._start_rate()

    def _start_reducer(self, ddp_options: Mapping[str, Any] | None) -> None:
        """Reduce gradients into the optimizer's tensors without DistributedDataParallel."""
        replicas, experts = replica_axis(self.context), distributed_experts(self.table, self.context)
        with self._guard("data parallel setup"):
            broadcast_parameters(self._module, replicas.group, replicas.ranks, without=experts)
            holders = self.context.axis("expert_replica")
            ExpertGradients(self._module.named_parameters(), experts, holders, self._guard)
        self._masters = Masters(self._module.named_parameters(), self.precision.optimizer)
        self._reducer = GradientReducer(
            self._module.named_parameters(),
            self._masters,
            self.precision.reduce,
            group_of_each(self.table, self.context),
            **reducer_options(ddp_options or {}, "a pipeline" if self._stages is not None else self.precision),
        )

    def _run_pipeline(self, step: PipelineStep, *, backward: bool) -> None:
        assert self._pipeline is not None
        self._pipeline.run(step, backward=backward)

    @property
    def _autocasts(self) -> bool:
        return self.precision.casts and not self._sharded

    def _check_precision(self) -> None:
        precision = self.precision
        if self._sharded and precision.has_masters:
            raise ConfigurationError(
                f"FSDP2 keeps no masters of {precision.parameters} parameters: build the model in float32, and pass "
                f"precision=Precision(compute={precision.compute_dtype})."
            )
        if not self._sharded and not precision.has_masters and precision.reduce != precision.parameters:
            raise ConfigurationError(
                f"DistributedDataParallel reduces gradients in the dtype of the parameters: got reduce="
                f"{precision.reduce}, expected {precision.parameters}."
            )

    @property
    def _averages(self) -> bool:
        return getattr(self._wrapped, "require_backward_grad_sync", True)

    @property
    def _holds(self) -> Held | None:
        return "shards" if self._sharded else super()._holds

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters as the engine holds them: with FSDP2 the shards, whatever a forward pass has gathered."""
        if self._sharded:
            for root in self._roots:
                reshard(root)
        return self._module.named_parameters()

    def _updated(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors that the optimizer updates: the parameters, or their masters."""
        return self._parameters() if self._masters is None else self._masters.named()

    @property
    def _roots(self) -> Sequence[nn.Module]:
        """The modules that FSDP2 treats as roots: the model, or what the pipeline's schedule calls."""
        return [self._module] if self._pipeline is None else self._pipeline.modules

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients, averaged over the replicas."""
        self._refuse_in_pipeline("the engine's backward pass")
        self._passes.note_backward()
        if isinstance(self._wrapped, DistributedDataParallel):
            self._passes.check_wrapper("DistributedDataParallel")
        with self._guard("data backward"):
            self._scaled(loss).backward()
            if self._reducer is not None and self._reducer.sends:
                self._reducer.finish()
            if self._experts is not None and self._wrapped.require_backward_grad_sync:
                self._experts.average()
        self._skips_sync = True

    def step(self) -> StepResult:
        """Clip, update, and clear the gradients; a gradient that is not finite skips the update with a warning."""
        with self._guard("data step"):
            self._generators.compare()
            norm = global_grad_norm(self._updated(), self.table, self.context, self.model_weights.owned)
        return self._update_if_finite(norm, (parameter for _, parameter in self._updated()), local_tensor)

    def _update(self) -> None:
        self.optimizer.step()
        if self._masters is not None:
            self._masters.write_parameters()

    def zero_grad(self) -> None:
        """Clear accumulated gradients."""
        self._passes.note_step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._sharded:
            for root in self._roots:
                drop_accumulated_gradients(root)
        if self._reducer is not None:
            self._reducer.clear()

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches except the last."""
        self._refuse_in_pipeline("accumulate()")
        if isinstance(self._wrapped, DistributedDataParallel):
            return self._wrapped.no_sync() if self._skips_sync else nullcontext()
        if self._reducer is not None:
            return self._without_sending(self._reducer)
        return self._without_sync() if self._sharded else nullcontext()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameter names with tensor-parallel shards, gathered over the replicas."""
        for name, parameter in self._parameters():
            with self._guard("data gather of weights"):
                yield name, full_tensor(parameter.detach())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensor-parallel shards into the parameters."""
        self.updates += 1
        parameters = dict(self._parameters())
        with torch.no_grad():
            for name, value in weights:
                parameter = parameters[name]
                check_shard(name, value, tuple(parameter.shape))
                parameter.copy_(_like(value, parameter))
                if self._masters is not None and name in self._masters:
                    self._masters[name].copy_(value)

    def weight_pieces(self) -> Iterator[Piece]:
        """Yield this rank's piece of every parameter."""
        for name, parameter in self._parameters():
            yield self._piece(name, WEIGHT, parameter.detach())

    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's state on this rank."""
        optimizer_state.materialize(self.optimizer)
        pieces = [
            self._piece(name, slot, value)
            for name, parameter in self._updated()
            for slot, value in optimizer_state.slots(self.optimizer, parameter).items()
        ]
        if self._masters is not None:
            pieces += [self._piece(name, MASTER, master.detach()) for name, master in self._masters.narrow()]
        return self._state(pieces)

    def weights_written(self) -> None:
        """Count the update, and refresh the masters."""
        self.updates += 1
        if self._masters is not None:
            self._masters.read_parameters()

    def optimizer_written(self, state: OptimizerState) -> None:
        """Continue from a saved state; the parameters are the masters, rounded."""
        super().optimizer_written(state)
        if self._masters is not None:
            self._masters.write_parameters()

    def close(self) -> None:
        """Release the wrapper, and compute the model's matrix products without float8 again."""
        self._undo_float8()
        if self._reducer is not None:
            self._reducer.close()
        super().close()

    def _piece(self, name: str, slot: str, tensor: Any) -> Piece:
        if is_dtensor(tensor):
            start, local = sharded_rows(tensor)
            return Piece(parameter=name, slot=slot, start=start, values=local.view(-1))
        return replicated_piece(name, slot, tensor, holder_axis(self.context, self.table[name].layout))

    @contextmanager
    def _without_sending(self, reducer: GradientReducer) -> Iterator[None]:
        reducer.sends = False
        try:
            yield
        finally:
            reducer.sends = True

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        unshard_gradient_sync(self._module, False)
        try:
            yield
        finally:
            unshard_gradient_sync(self._module, True)


def _like(value: torch.Tensor, parameter: Any) -> Any:
    if not is_dtensor(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    where = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), *where, src_data_rank=None)
