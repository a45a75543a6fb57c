"""The protocols of an adapter and of its training engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from polyshard.core.batch import BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.capabilities import Capabilities
from polyshard.core.context import ParallelContext
from polyshard.core.model_weights import ModelWeights
from polyshard.core.optimizer import OptimizerFactory
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.pieces import OptimizerState, Piece
from polyshard.core.precision import Precision
from polyshard.core.requirement import Requirement
from polyshard.core.weight_table import WeightTable


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The result of one optimizer step.

    Attributes:
        grad_norm: norm of the gradient of the full model over all ranks, before clipping; None if the engine does not
            compute it.
        skipped: whether the step was skipped because a gradient was not finite. The weights are then unchanged.

    Examples:
        >>> StepResult(grad_norm=0.5)
        StepResult(grad_norm=0.5, skipped=False)
    """

    grad_norm: float | None
    skipped: bool = False


@runtime_checkable
class TrainingEngine(Protocol):
    """A model wrapped by a parallelism library: data parallelism, gradient clipping and the optimizer.

    Examples:
        >>> context = ps.initialize("torch")
        >>> engine = ps.load_adapter("torch").engine(ps.column_parallel(4, 2, context), ps.AdamW(), context)
        >>> engine.backward(engine(torch.ones(1, 4)).sum())
        >>> engine.step().skipped, engine.updates
        (False, 1)
    """

    @property
    def module(self) -> nn.Module:
        """The model as the factory built it."""
        ...

    precision: Precision  # dtypes of the run
    updates: int  # how often the weights have changed: steps that were not skipped, and loads

    @property
    def table(self) -> WeightTable:
        """The model's weight layouts, collected before the model was wrapped."""
        ...

    @property
    def has_gradients(self) -> bool:
        """Whether gradients wait for `step`."""
        ...

    model_weights: ModelWeights  # over all pipeline stages, with the dtypes of the parameters as they were built

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass through the library's wrapper."""
        ...

    def computing(self) -> AbstractContextManager[Any]:
        """A context in which the model's operations compute in the dtype that the engine's precision names."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`, averaged over the replicas with equal weights."""
        ...

    def train_batch(
        self, micro_batches: Sequence[MicroBatch], loss: SumLoss | None = None, tokens: CountTokens | None = None
    ) -> BatchResult:
        """Run the forward and backward passes of one step, with every token weighted equally.

        Use it in place of `__call__`, `backward` and `accumulate`, which average the means of micro-batches and ranks.
        See `polyshard.train_batch` for the arguments.
        """
        ...

    def eval_batch(
        self, micro_batches: Sequence[MicroBatch], loss: SumLoss | None = None, tokens: CountTokens | None = None
    ) -> BatchResult:
        """Return the loss of micro-batches without gradients; the arguments are those of `train_batch`."""
        ...

    def step(self) -> StepResult:
        """Clip, update the weights, and clear the gradients."""
        ...

    def zero_grad(self) -> None:
        """Clear the accumulated gradients."""
        ...

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update; a parameter group multiplies it by its `lr_scale`."""
        ...

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate, beginning with the next step; parameter groups keep their ratios.

        Raises:
            ConfigurationError: the engine has a scheduler.
        """
        ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Return a context manager for all micro-batches of a step but the last: it postpones gradient communication.

        Run the forward and backward passes of those micro-batches inside it.
        """
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name of each parameter in the built model and this rank's full tensor-parallel shard of it.

        A collective over the data axis: every rank must iterate to the end.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Set parameters from this rank's tensor-parallel shards, by their names in the built model."""
        ...

    def weight_pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the parameters that this rank holds, with slot `"weight"`, without communication."""
        ...

    def weights_written(self) -> None:
        """Refresh the library's own copies after values were written into the weight pieces. A collective."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """Return the optimizer's state on this rank. It is created if no step has been taken yet."""
        ...

    def optimizer_written(self, state: OptimizerState) -> None:
        """Continue from a saved state, whose pieces have been written into the optimizer's.

        Args:
            state: its pieces and groups are not read. A scheduler keeps its own rate and state if `schedule` is None.
        """
        ...

    def close(self) -> None:
        """Release the resources that the library holds for this engine."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """The integration of one parallelism library or server.

    Attributes:
        name: the name under which `polyshard.load_adapter` finds the adapter.
        capabilities: the features that the adapter supports.
        requirement: the library behind it and its supported versions.
        linear: the `LinearAdapter` that builds its layers.

    Examples:
        >>> isinstance(ps.load_adapter("torch"), Adapter)
        True
    """

    name: str
    capabilities: Capabilities
    requirement: Requirement
    linear: Any

    def initialize(self, layout: ParallelLayout | None = None, **options: Any) -> ParallelContext:
        """Create process groups from torchrun's environment, or a single-process context without torchrun."""
        ...

    def adopt(self, context: ParallelContext) -> ParallelContext:
        """Return a context with this library's layers on process groups that exist, such as those of a vLLM worker."""
        ...

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> TrainingEngine:
        """Wrap a model that was built with `context` in the library's training engine."""
        ...

    def shutdown(self, context: ParallelContext) -> None:
        """Destroy the process groups that `initialize` created, so that it can be called again."""
        ...
