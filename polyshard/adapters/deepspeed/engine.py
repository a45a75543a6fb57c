"""The training engine on DeepSpeed, ZeRO stages 0 to 3, with the context as its mpu."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.adapters.deepspeed.compat import (
    base_optimizer,
    clear_gradients,
    deepspeed,
    forget_autocast,
    forget_mpu,
    gather_persistent,
    gathered,
    naming_wrong_settings,
    partition,
    zero_fragments,
)
from polyshard.adapters.deepspeed.context import Mpu, check_accelerator
from polyshard.adapters.deepspeed.expert_training import ExpertTraining
from polyshard.adapters.deepspeed.norm_compat import count_gradients, skip_infinite_gradients
from polyshard.adapters.deepspeed.pipeline import SETTINGS as PIPELINE_SETTINGS
from polyshard.adapters.deepspeed.pipeline import DeepspeedPipeline, check_pipeline
from polyshard.adapters.deepspeed.pipeline_compat import accumulated_gradient, reduce_gradients, take_step
from polyshard.adapters.deepspeed.settings import (
    check_config,
    check_precision,
    engine_settings,
    with_offload,
    zero_settings,
)
from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.base_engine import BaseEngine
from polyshard.adapters.shared.grad_norm import counted_parts, scale_gradients, unsharded_norm
from polyshard.adapters.shared.offload import Offload, check_offload
from polyshard.adapters.shared.quiet import printing_as_log
from polyshard.adapters.shared.tied_weights import copy_from_owners, sum_over_copies
from polyshard.adapters.shared.weights import check_shard
from polyshard.core.adapter import OptimizerFactory, StepResult
from polyshard.core.context import ParallelContext, holder_axis, replica_axis
from polyshard.core.engine_copies import Held
from polyshard.core.errors import ConfigurationError
from polyshard.core.pieces import MASTER, WEIGHT, OptimizerState, Piece, replicated_piece
from polyshard.core.precision import Precision
from polyshard.layers.forward_gradients import mark_gathered_per_call
from polyshard.training.compile import Compile
from polyshard.training.pipeline_step import PipelineStep
from polyshard.training.recompute import Recompute
from polyshard.training.schedule import SchedulerFactory

logger = logging.getLogger(__name__)


class DeepspeedEngine(BaseEngine):
    """`TrainingEngine` on DeepSpeed over the replicas.

    Args:
        model: as its factory built it with `context`.
        optimizer: makes torch's optimizer, which ZeRO wraps.
        context: where this process stands.
        zero_stage: 0 to 3.
        max_grad_norm: clip the whole model's gradient to this norm; None does not clip.
        precision: dtypes of the run. Float32 parameters are cast by DeepSpeed's `torch_autocast`; bfloat16 parameters
            get float32 masters at stages 1 to 3.
        recompute: activations that are recomputed in the backward pass: `"none"`, `"selective"`, `"full"`, or a
            function that chooses modules.
        scheduler: makes a scheduler of torch (`torch.optim.lr_scheduler`) from an optimizer. It advances with each
            update that is not skipped, and parameter groups scale its rate.
        compile: modules that torch.compile compiles: True for the blocks, or a function that chooses modules.
        check_random: compare random generators over the ranks before the first update, in one small all-reduce per axis
            of several ranks; see `polyshard.manual_seed`.
        offload: `"optimizer"` keeps masters and optimizer state on the CPU, and updates them there with torch's own
            optimizer. It has run on CPU ranks only.
        config: further fields of DeepSpeed's configuration.

    Raises:
        ConfigurationError: an unknown stage; or in `config` gradient accumulation, a scheduler or an optimizer.
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
        offload: Offload = "none",
        compile: Compile = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        if zero_stage not in (0, 1, 2, 3):
            raise ConfigurationError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage!r}")
        check_config(config or {})
        zero = zero_settings(zero_stage, config or {}, compile is not False)
        check_accelerator(context.device)
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
        model = self._module
        check_precision(self.precision, zero_stage, config or {})
        self._stage = zero_stage
        self._boundary = True  # False while all but the last micro-batch accumulate
        self._pipeline: DeepspeedPipeline | None = None
        if self._stages is not None:
            check_pipeline(self._stages, zero_stage, offload, config or {})
            copy_from_owners(dict(model.named_parameters()), self.model_weights, context)
            self._pipeline = DeepspeedPipeline(self._stages, context)
        self._norm: torch.Tensor | None = None  # of the step under way, at stage 0
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        settings = engine_settings(max_grad_norm, self.precision, zero, config or {})
        if self._pipeline is not None:
            settings = {**settings, **PIPELINE_SETTINGS}
        if check_offload(offload, context.device, zero_stage > 0, "zero_stage 1 to 3"):
            settings = with_offload(settings, context.device)
        forget_autocast()
        self._experts = ExpertTraining(model, self.table, context, zero_stage)
        built = self._build(optimizer, model.named_parameters(), held="flat" if zero_stage else "whole")
        wrapped = model if self._pipeline is None else self._pipeline.module
        with self._guard("data parallel setup"), printing_as_log(logger, "DeepSpeed"), self._experts.marked(wrapped):
            initialize: Any = naming_wrong_settings()(deepspeed.initialize)
            self._wrapped, self.optimizer, _, _ = initialize(
                model=wrapped,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=self._experts.split(built),
                config=settings,
                mpu=Mpu(context) if self._pipeline is None else None,  # a PipelineModule has its own
                dist_init_required=False,
            )
        self._start_rate()
        if zero_stage == 3:
            mark_gathered_per_call(model.parameters())
        if zero_stage:
            skip_infinite_gradients(self.optimizer)
            count_gradients(
                self.optimizer,
                zero_stage,
                dict(model.named_parameters()),
                self._counted_parts,
                [axis.group for axis in (replica_axis(context), context.axis("tensor"), context.axis("pipeline"))],
            )
        else:
            self._wrapped.clip_fp32_gradients = self._clip

    _pipeline_has_fixed_shapes = False

    @property
    def _holds(self) -> Held | None:
        return "shards" if self._stage == 3 else "copies" if self._stage else None

    def _run_pipeline(self, step: PipelineStep, *, backward: bool) -> None:
        """Run DeepSpeed's schedule; `step` of the engine averages the gradients over the replicas."""
        assert self._pipeline is not None
        self._pipeline.run(self._wrapped, step, backward=backward)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, averaged over the replicas."""
        self._refuse_in_pipeline("the engine's backward pass")
        self._passes.note_backward()
        if self._stage in (1, 2):
            self._passes.check_step(f"ZeRO stage {self._stage}")
        elif self._stage == 3:
            self._passes.check_last_forward("ZeRO stage 3")
        self._passes.forward = False
        with self._guard("data backward"):
            self._wrapped.backward(loss)

    def step(self) -> StepResult:
        """Run DeepSpeed's step, which clips, updates, and clears the gradients; skip it if a gradient is not finite."""
        self.updates += 1
        self._passes.note_step()
        with self._guard("data step"):
            self._generators.compare()
            if self._pipeline is not None:
                copies = self.model_weights.holders
                held = {name: p for name, p in self._module.named_parameters() if name in copies and p.requires_grad}
                gradients = {name: accumulated_gradient(self._wrapped, p) for name, p in held.items()}
                sum_over_copies(gradients, self.model_weights, self.context)
                reduce_gradients(self._wrapped)
            if self._stage == 0:  # DeepSpeed clips there, but keeps no norm
                named = self._module.named_parameters()
                self._norm = unsharded_norm(named, self.table, self.context, self.model_weights.owned)
            if self._norm is not None and not math.isfinite(float(self._norm)):
                skipped = True  # at stage 0 DeepSpeed checks float16 alone
                self.zero_grad()
            else:
                (self._wrapped.step if self._pipeline is None else partial(take_step, self._wrapped))()
                skipped = bool(getattr(self.optimizer, "overflow", False))
            norm = self._wrapped.get_global_grad_norm() if self._norm is None else self._norm
        value = None if norm is None else float(norm)
        if skipped:
            logger.warning("gradient norm is %s: this step is skipped", value)
            self.updates -= 1  # counted above, since an error in the step may leave weights changed
        else:
            self._rate.updated()
        return StepResult(grad_norm=value, skipped=skipped)

    def zero_grad(self) -> None:
        """Clear accumulated gradients."""
        self._passes.note_step()
        clear_gradients(self._wrapped.optimizer)

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches except the last."""
        self._refuse_in_pipeline("accumulate()")
        return self._without_boundary()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameter names with tensor-parallel shards, gathered over the replicas."""
        for name, parameter in self._module.named_parameters():
            with self._guard("data gather of weights"), gathered([parameter] if self._stage == 3 else []):
                yield name, parameter.detach().clone() if self._stage == 3 else parameter.detach()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensor-parallel shards into the parameters and the optimizer's copies of them."""
        self.updates += 1
        parameters = dict(self._module.named_parameters())
        for name, value in weights:
            check_shard(name, value, self._shapes[name])
            partitioned = [parameters[name]] if self._stage == 3 else []
            with torch.no_grad(), self._guard("data load"), gathered(partitioned, modifier_rank=0):
                parameters[name].copy_(value)
            if self.precision.has_masters:
                # Refreshing would round the masters to the parameters: they get the values that were given.
                flat = value.reshape(-1)
                for slot, start, master in self._fragments(parameters[name]):
                    if slot == MASTER:
                        master.copy_(flat[start : start + master.numel()])
        if self._stage and not self.precision.has_masters:
            self._wrapped.optimizer.refresh_fp32_params()

    def weight_pieces(self) -> Iterator[Piece]:
        """Yield this rank's piece of every parameter; at stage 3 its partition."""
        for name, parameter in self._module.named_parameters():
            axis = holder_axis(self.context, self.table[name].layout)
            if self._stage == 3:
                start, values = partition(parameter, axis.rank)
                yield Piece(parameter=name, slot=WEIGHT, start=start, values=values)
                continue
            yield replicated_piece(name, WEIGHT, parameter.detach(), axis)

    def weights_written(self) -> None:
        """Refresh the optimizer's copies of the parameters, and the parameters that stage 3 keeps gathered."""
        self.updates += 1
        if self._stage:
            self._wrapped.optimizer.refresh_fp32_params()
        if self._stage == 3:
            with self._guard("data gather of weights"):
                gather_persistent(self._wrapped.optimizer)

    def optimizer_state(self) -> OptimizerState:
        """Return this rank's pieces of the optimizer state; at stage 0 every rank holds the full state."""
        base = base_optimizer(self.optimizer)
        pieces: list[Piece] = []
        for name, parameter in self._module.named_parameters():
            axis = holder_axis(self.context, self.table[name].layout)
            if self._stage == 0:
                pieces += [
                    replicated_piece(name, slot, value, axis)
                    for slot, value in optimizer_state.slots(base, parameter).items()
                ]
                continue
            for slot, start, values in zero_fragments(self._wrapped.optimizer, base, parameter, self._stage, axis.rank):
                if slot != MASTER or values.dtype != parameter.dtype:
                    pieces.append(Piece(parameter=name, slot=slot, start=start, values=values))
        return self._state(pieces)

    def close(self) -> None:
        """Destroy the engine, and forget its mpu."""
        self._undo_recomputation()
        self._undo_compile()
        self._wrapped.destroy()
        self._experts.close()
        self._release()
        forget_mpu()

    def _base_optimizers(self) -> list[Any]:
        return [base_optimizer(self.optimizer)]

    def _fragments(self, parameter: nn.Parameter) -> Iterator[tuple[str, int, torch.Tensor]]:
        base, rank = base_optimizer(self.optimizer), replica_axis(self.context).rank
        return zero_fragments(self._wrapped.optimizer, base, parameter, self._stage, rank)

    def _clip(self) -> None:
        """Clip at stage 0, where DeepSpeed's own norm counts shared KV heads several times."""
        assert self._norm is not None
        scale_gradients(self._module.parameters(), self._norm, self._max_grad_norm)

    def _counted_parts(self, name: str, values: torch.Tensor, start: int) -> list[torch.Tensor]:
        """Return the parts of a gradient that count on this rank; another stage counts a weight that is tied to it."""
        axis = self.context.axis("tensor")
        owned = name in self.model_weights.owned
        return counted_parts(self.table[name], values, start, axis.rank, axis.size) if owned else []

    @property
    def _averages(self) -> bool:
        return self._boundary

    @contextmanager
    def _without_boundary(self) -> Iterator[None]:
        self._boundary = False
        self._wrapped.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._boundary = True
            self._wrapped.set_gradient_accumulation_boundary(True)
