"""What the training engines of all libraries have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from polyshard.adapters.shared import optimizer_state
from polyshard.adapters.shared.devices import check_devices
from polyshard.adapters.shared.grad_norm import check_max_grad_norm
from polyshard.core.adapter import StepResult
from polyshard.core.batch import BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.pieces import WEIGHT, OptimizerState, Piece, replicated_piece
from polyshard.core.precision import Precision, precision_of
from polyshard.core.weight_table import collect_layouts
from polyshard.training.batch import train_batch
from polyshard.training.generators import GeneratorCheck
from polyshard.training.recompute import Recompute, apply_recomputation


class BaseEngine(ABC):
    """The part of `TrainingEngine` that does not depend on the library.

    A subclass wraps the model as its library does, and sets `_wrapped` and `optimizer`.

    Args:
        model: as its factory built it with `context`; not wrapped yet.
        context: where this process stands.
        max_grad_norm: clip the model's gradient to this norm; None does not clip.
        check_random: compare random generators over the ranks before the first update.
        recompute: which activations are recomputed in the backward pass; see `apply_recomputation`.
        precision: dtypes of the run; default that of the parameters, with float32 in the optimizer.

    Raises:
        ConfigurationError: a norm that is not positive, or parameters on another device than the context's.
    """

    optimizer: Any  # the library's

    def __init__(
        self,
        model: nn.Module,
        context: ParallelContext,
        *,
        max_grad_norm: float | None,
        check_random: bool,
        precision: Precision | None = None,
        recompute: Recompute = "none",
    ) -> None:
        check_max_grad_norm(max_grad_norm)
        check_devices(model, context)
        self.precision = precision_of(model, precision)
        self.context = context
        self.updates = 0
        self.table = collect_layouts(model)
        self._module = model
        self._wrapped: Any = model
        self._guard = context.guard
        self._undo_recomputation = apply_recomputation(model, recompute)
        self._max_grad_norm = max_grad_norm
        self._generators = GeneratorCheck(model, context, check_random)

    @property
    def module(self) -> nn.Module:
        """The model as the factory built it."""
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward inside the library's wrapper, in the dtype of computation."""
        with self._guard("data forward"), self._generators.watching(), self.computing():
            return self._wrapped(*args, **kwargs)

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
        with self._guard("data backward"):
            loss.backward()

    def train_batch(
        self, micro_batches: Sequence[MicroBatch], loss: SumLoss | None = None, tokens: CountTokens | None = None
    ) -> BatchResult:
        """Run forward and backward of one step's micro-batches, weighted by tokens: see `polyshard.train_batch`."""
        return train_batch(self, self.context, micro_batches, loss, tokens)

    @abstractmethod
    def step(self) -> StepResult:
        """Clip, update the weights, and clear the gradients."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Clear accumulated gradients."""

    @abstractmethod
    def accumulate(self) -> AbstractContextManager[None]:
        """Enclose forward and backward of all micro-batches but the last."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Set parameters from tensor-parallel shards."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's state on this rank."""

    def set_learning_rate(self, lr: float) -> None:
        """Use this rate from the next step on."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names as built, with tensor-parallel shards that every replica holds in full."""
        for name, parameter in self._module.named_parameters():
            yield name, parameter.detach()

    def weight_pieces(self) -> Iterator[Piece]:
        """This rank's run of every parameter, which all replicas hold."""
        axis = replica_axis(self.context)
        for name, parameter in self._module.named_parameters():
            yield replicated_piece(name, WEIGHT, parameter.detach(), axis)

    def weights_written(self) -> None:
        """Count the update: the pieces are the parameters themselves."""
        self.updates += 1

    def optimizer_written(self, step: int, lr: float) -> None:
        """Continue from update `step` with learning rate `lr`."""
        optimizer_state.set_step(self._base_optimizer(), step)
        self.set_learning_rate(lr)

    def close(self) -> None:
        """Release the wrapper, and with it the process group that it holds."""
        self._undo_recomputation()
        self._wrapped = self._module

    def _base_optimizer(self) -> Any:
        """The torch optimizer inside the library's, which holds the state."""
        return self.optimizer
