"""The base class of all training engines."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.built_parameters import BuiltParameters, check_grad_enabled
from polyshard.adapters.shared.devices import check_devices
from polyshard.adapters.shared.grad_norm import check_max_grad_norm, scale_gradients
from polyshard.adapters.shared.learning_rate import LearningRate, set_scales
from polyshard.adapters.shared.loss_scale import LossScale
from polyshard.adapters.shared.parameter_groups import Held as Parts
from polyshard.adapters.shared.parameter_groups import (
    check_built,
    check_elementwise,
    check_patterns,
    settings_of_groups,
)
from polyshard.adapters.shared.pass_order import PassOrder
from polyshard.adapters.shared.pipeline_checks import check_not_interrupted, check_trained_stages, refuse_in_pipeline
from polyshard.adapters.shared.weights import check_unsharded
from polyshard.core.adapter import StepResult
from polyshard.core.batch import BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.build_stages import as_stages
from polyshard.core.context import ParallelContext, check_context, holder_axis
from polyshard.core.engine_copies import Held, mark_held
from polyshard.core.errors import ConfigurationError
from polyshard.core.model_weights import ModelWeights
from polyshard.core.optimizer import OptimizerFactory
from polyshard.core.parameter_groups import GroupSettings
from polyshard.core.pieces import WEIGHT, OptimizerState, Piece, replicated_piece
from polyshard.core.precision import Precision, precision_of
from polyshard.core.stages import Stages
from polyshard.core.weight_table import collect_layouts
from polyshard.training.compile import Compile, apply_compile
from polyshard.training.generators import GeneratorCheck
from polyshard.training.muon import Muon
from polyshard.training.pipeline_step import PipelineStep
from polyshard.training.prepared import vocabulary_of_head
from polyshard.training.recompute import Recompute, apply_recomputation
from polyshard.training.schedule import SchedulerFactory
from polyshard.training.train_batch import eval_batch, train_batch, warn_of_unshifted_labels

logger = logging.getLogger(__name__)


class BaseEngine(ABC):
    """The library-independent part of `TrainingEngine`.

    A subclass wraps the model with its library, sets `_wrapped` and `optimizer`, and then calls `_start_rate`. If the
    library runs pipelines, it also overrides `_run_pipeline`, and trains `_stages` where that is not None.

    Args:
        model: the unwrapped model that its factory built with `context`.
        context: this process's parallel context.
        max_grad_norm: maximum norm of the gradient of the full model; None disables clipping.
        check_random: compare random generators over the ranks before the first update.
        recompute: which activations are recomputed in the backward pass; see `apply_recomputation`.
        compile: which modules torch.compile compiles; see `apply_compile`.
        precision: dtypes of the run; default that of the parameters, with float32 in the optimizer.
        scheduler: makes a scheduler of torch, which sets the learning rate of each update.

    Raises:
        ConfigurationError: the model is no module, the context is no context, the norm is not positive, parameters are
            not on the context's device, or the model's experts are distributed over ranks and the engine cannot train
            them.
    """

    _trains_distributed_experts = False  # averages their gradients over the ranks that hold the same experts only

    optimizer: Any  # the library's optimizer
    _built: BuiltParameters
    _loaded: RemovableHandle | None = None  # of a hook that refreshes copies after `load_state_dict`
    _rate: LearningRate
    _first_lr: float
    _settings: dict[str, GroupSettings]  # of each trained parameter, by its canonical name

    def __init__(
        self,
        model: nn.Module,
        context: ParallelContext,
        *,
        max_grad_norm: float | None,
        check_random: bool,
        precision: Precision | None = None,
        recompute: Recompute = "none",
        scheduler: SchedulerFactory | None = None,
        compile: Compile = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model is invalid: got {type(model).__name__}, expected a torch.nn.Module.")
        check_context(context, type(self).__name__)
        check_max_grad_norm(max_grad_norm)
        self._stages = as_stages(model, context) if context.axis("pipeline").size > 1 else None
        model = _only_stage(model) if self._stages is None else self._stages
        check_unsharded(model)
        check_devices(model, context)
        self.precision = _precision_of_run(model, precision, context)
        self.context = context
        self.updates = 0
        self.table = collect_layouts(model)
        self.head_vocabulary = vocabulary_of_head(model, self.table)
        self.model_weights = ModelWeights.of(model, self.table, context)
        check_trained_stages(self.model_weights, context)
        has_experts = any(entry.layout.experts is not None for entry in self.table.values())
        if has_experts and context.axis("expert").size > 1 and not self._trains_distributed_experts:
            raise ConfigurationError(
                f"{type(self).__name__} cannot train experts that are distributed over ranks: got an expert-parallel "
                f"size of {context.axis('expert').size}, expected 1. Use torch's engine, or a size of 1."
            )
        for parameter in model.parameters():
            parameter.grad = None  # what an earlier engine left belongs to no step of this one
        self._module = model
        self._wrapped: Any = model
        self._guard = context.guard
        self._interrupted: str | None = None  # the error that ended a pipeline's schedule before its end
        self._scale = LossScale(self.precision.loss_scale if self.precision.scales_loss else 1.0)
        self._undo_compile = apply_compile(model, compile, exact=context.exact is not None)
        self._undo_recomputation = apply_recomputation(model, recompute)
        self._max_grad_norm = max_grad_norm
        self._scheduler = scheduler
        self._generators = GeneratorCheck(model, context, check_random)
        self._has_seen_labels = False
        self._passes = PassOrder(lambda: self._averages)

    def _build(
        self, optimizer: OptimizerFactory, named: Iterable[tuple[str, nn.Parameter]], held: Parts
    ) -> torch.optim.Optimizer:
        """Return the torch optimizer of parameters, which it gets by their canonical names.

        Args:
            optimizer: the user's.
            named: by their names in the built model.
            held: what the optimizer updates: whole tensor-parallel shards, DTensors of their rows, or parts of them
                that the library flattens.
        """
        check_patterns(optimizer, self.table, self.context)
        canonical = {self.table[name].name: parameter for name, parameter in named}
        factory = optimizer.on(self.table, self.context) if isinstance(optimizer, Muon) else optimizer
        built = factory(canonical.items())
        check_built(built, canonical)
        check_elementwise(built, self.table.values(), canonical, self.context.axis("tensor").size, held)
        self._first_lr = set_scales(built)
        self._settings = settings_of_groups(built, canonical)
        return built

    def _start_rate(self, lr: float | None = None) -> None:
        """Set the first learning rate, after `optimizer` has been set; by default that of the one that was built."""
        mark_held(self._module, self._holds)
        self._built = BuiltParameters.of(self._module, sharded=self._holds == "shards")
        if self._holds == "copies":
            self._loaded = self._module.register_load_state_dict_post_hook(lambda *_: self.weights_written())
        self._rate = LearningRate(self.optimizer, self._first_lr if lr is None else lr, self._scheduler)

    @property
    def _holds(self) -> Held | None:
        """What the optimizer updates in place of the module's parameters."""
        return "copies" if self.precision.has_masters else None

    @property
    def module(self) -> nn.Module:
        """The unwrapped model."""
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward inside the library's wrapper, in the dtype of computation."""
        self._refuse_in_pipeline("the engine's forward pass")
        self._passes.note_forward()
        with self._guard("data forward"), self._generators.watching(), self.computing():
            return self._wrapped(*args, **kwargs)

    @property
    def _averages(self) -> bool:
        """Whether the next backward pass averages gradients over the replicas, because nothing accumulates."""
        return True

    @property
    def has_gradients(self) -> bool:
        """Whether gradients wait for `step`."""
        return self._passes.gradients

    def computing(self) -> AbstractContextManager[Any]:
        """Return a context in which the model's operations compute in `precision.compute`.

        `__call__` enters it. Enter it around a loss that the model computes outside of its forward, too.
        """
        if not self._autocasts:
            return nullcontext()
        return torch.autocast(self.context.device.type, dtype=self.precision.compute_dtype)

    @property
    def _autocasts(self) -> bool:
        """Whether `torch.autocast` casts the parameters for each operation; a library may cast by its own means."""
        return self.precision.casts

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, averaged over the replicas."""
        self._refuse_in_pipeline("the engine's backward pass")
        self._passes.note_backward()
        with self._guard("data backward"):
            loss.backward()

    def train_batch(
        self, micro_batches: Sequence[MicroBatch], loss: SumLoss | None = None, tokens: CountTokens | None = None
    ) -> BatchResult:
        """Run the forward and backward passes of one step's micro-batches; see `polyshard.train_batch`.

        In a pipeline all its ranks pass the same micro-batches, which contain `input_ids`. The `loss` is called on the
        ranks of the last stage only. An error after the first backward pass discards the gradients of the step.
        """
        if loss is None and getattr(self._wrapped, "find_unused_parameters", False):
            raise ConfigurationError(
                "find_unused_parameters=True is unsupported with the default loss: it runs the head after the model's "
                "forward pass, and DistributedDataParallel would take the head for unused. Pass static_graph=True, "
                "which finds unused parameters, too, or a loss= of your own."
            )
        if loss is None and not self._has_seen_labels:
            warn_of_unshifted_labels(micro_batches)
            self._has_seen_labels = True
        check_grad_enabled()
        self._built.check(self._module)
        if self._stages is None:
            with self._passes.complete(self.zero_grad):
                return train_batch(self, self.context, micro_batches, loss, tokens)
        step = self._pipeline_step(self._stages, micro_batches, loss, tokens)
        self._passes.note_backward()
        with self._generators.watching():
            self._run_pipeline(step, backward=True)
        return step.result()

    def eval_batch(
        self, micro_batches: Sequence[MicroBatch], loss: SumLoss | None = None, tokens: CountTokens | None = None
    ) -> BatchResult:
        """Return the loss of micro-batches without gradients; the arguments are those of `train_batch`."""
        if self._stages is None:
            return eval_batch(self, self.context, micro_batches, loss, tokens)
        step = self._pipeline_step(self._stages, micro_batches, loss, tokens)
        self._run_pipeline(step, backward=False)
        return step.result()

    def _pipeline_step(
        self,
        stages: Stages,
        micro_batches: Sequence[MicroBatch],
        loss: SumLoss | None,
        tokens: CountTokens | None,
    ) -> PipelineStep:
        check_not_interrupted(self._interrupted, self.context)

        def interrupted(error: Exception) -> None:
            self._interrupted = f"{type(error).__name__}: {error}"

        return PipelineStep(
            stages,
            self.context,
            micro_batches,
            loss,
            tokens,
            computing=self.computing,
            scaled=self._scaled,
            fixed_shapes=self._pipeline_has_fixed_shapes,
            interrupted=interrupted,
            vocab_size=self.head_vocabulary,
        )

    @property
    def _pipeline_has_fixed_shapes(self) -> bool:
        """Whether micro-batches of unequal length are padded, because the library's buffers have a fixed size."""
        return True

    def _run_pipeline(self, step: PipelineStep, *, backward: bool) -> None:
        """Run a step by the library's schedule; if `backward`, leave gradients as `step` of the engine expects them.

        The gradients are averaged over the replicas, and those of tied weights are summed over the stages.
        """
        del step, backward
        raise NotImplementedError(f"{type(self).__name__} declares the capability pipeline, but runs none")

    def _refuse_in_pipeline(self, what: str) -> None:
        refuse_in_pipeline(self._stages, what)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the loss scale of a float16 run. Engines with a loss scale of their own override it."""
        return loss * self._scale.factor if self.precision.scales_loss else loss

    def _update_if_finite(
        self,
        norm: torch.Tensor,
        parameters: Iterable[nn.Parameter],
        local: Callable[[Any], torch.Tensor] = lambda gradient: gradient,
    ) -> StepResult:
        """Clip, update and clear the gradients; a norm that is not finite skips the update with a warning.

        Args:
            norm: of the gradients as they are, equal on every rank.
            parameters: what the optimizer updates.
            local: gives this rank's part of a gradient.
        """
        value = float(norm) / self._scale.factor
        finite = math.isfinite(value)
        if finite:
            self.updates += 1  # before the update: an error in it may leave weights changed
            scale_gradients(parameters, norm, self._max_grad_norm, self._scale.factor, local)
            self._update()
            self._rate.updated()
        else:
            logger.warning("gradient norm is %s: this step is skipped", value)
        if self.precision.scales_loss:
            self._scale.update(overflowed=not finite)
        self.zero_grad()
        return StepResult(grad_norm=value, skipped=not finite)

    def _update(self) -> None:
        self.optimizer.step()

    @abstractmethod
    def step(self) -> StepResult:
        """Clip the gradients, update the weights, and clear the gradients."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Clear accumulated gradients."""

    @abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches except the last, which skips gradient synchronization."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensor-parallel shards into the parameters."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's state on this rank."""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update; a parameter group multiplies it by its `lr_scale`."""
        return self._rate.lr

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the following steps."""
        self._rate.set(lr)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameter names with their tensor-parallel shards, which are equal on all replicas."""
        for name, parameter in self._module.named_parameters():
            yield name, parameter.detach()

    def weight_pieces(self) -> Iterator[Piece]:
        """Yield this rank's piece of every parameter; all replicas hold the full shard."""
        for name, parameter in self._module.named_parameters():
            axis = holder_axis(self.context, self.table[name].layout)
            yield replicated_piece(name, WEIGHT, parameter.detach(), axis)

    def weights_written(self) -> None:
        """Count the update; the pieces are views of the parameters, so nothing is copied."""
        self.updates += 1

    def optimizer_written(self, state: OptimizerState) -> None:
        """Set update count, numbers and learning rate after optimizer state was loaded."""
        for base in self._base_optimizers():
            optimizer_state.set_step(base, state.step)
            optimizer_state.set_scalars(base, state.scalars)
            optimizer_state.set_started(base, state.started)
        self._rate.load(state.lr, state.schedule)
        if state.loss_scale is not None and self.precision.scales_loss:
            self._load_loss_scale(state.loss_scale)

    def _state(self, pieces: Iterable[Piece]) -> OptimizerState:
        """Return the optimizer's state, of which the pieces are given."""
        bases, schedule = self._base_optimizers(), self._rate.schedule
        return OptimizerState(
            kind=optimizer_state.kind(bases[0]),
            step=max(optimizer_state.get_step(base) for base in bases),
            lr=self._rate.lr,
            pieces=pieces,
            schedule=None if schedule is None else schedule.state(),
            started=any(optimizer_state.is_started(base) for base in bases),
            scalars=optimizer_state.scalars(bases[0]),
            groups=self._settings,
            loss_scale=self._loss_scale_state() if self.precision.scales_loss else None,
        )

    def _loss_scale_state(self) -> Mapping[str, float]:
        return self._scale.state()

    def _load_loss_scale(self, saved: Mapping[str, float]) -> None:
        self._scale.load(saved)

    def close(self) -> None:
        """Release the wrapper and the process group that it holds."""
        if self._loaded is not None:
            self._loaded.remove()
        self._undo_recomputation()
        self._undo_compile()
        self._wrapped = self._module
        self._release()

    def _release(self) -> None:
        """Leave the weights to the module, unless they stay sharded."""
        if self._holds != "shards":
            mark_held(self._module, None)

    def _base_optimizers(self) -> list[Any]:
        """Return the torch optimizers inside the library's optimizer, which hold the state; all of one kind."""
        return [self.optimizer]


def _precision_of_run(model: nn.Module, given: Precision | None, context: ParallelContext) -> Precision:
    """Return the precision by which the library casts: in exact mode the layers cast, and no library does."""
    precision = precision_of(model, given)
    if context.exact is None or not precision.casts:
        return precision
    if precision.compute_dtype != context.exact.compute_dtype:
        raise ConfigurationError(
            f"the engine and exact mode have different dtypes: got compute={precision.compute_dtype}, and "
            f"{context.exact.compute_dtype or precision.parameters} in the context. Pass the same precision to "
            "ps.initialize(..., exact=True, precision=...)."
        )
    return replace(precision, compute=None)


def _only_stage(model: nn.Module) -> nn.Module:
    """Return the full model that `build_stages` built without a pipeline."""
    if isinstance(model, Stages):
        (model,) = model
    return model
