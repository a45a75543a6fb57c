"""What an adapter of a parallelism library offers: contexts, layers, and training engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from polyshard.core.batch import BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.capabilities import Capabilities
from polyshard.core.context import ParallelContext
from polyshard.core.layout import ParallelLayout
from polyshard.core.pieces import OptimizerState, Piece
from polyshard.core.precision import Precision
from polyshard.core.requirement import Requirement
from polyshard.core.weight_table import WeightTable


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """AdamW's settings as data: calling it makes torch's optimizer; a library with its own reads the fields.

    Vectors (norms, biases) are not decayed.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __call__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """torch's AdamW over the parameters that require a gradient."""
        trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
        groups = [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.lr, betas=self.betas, eps=self.eps
        )


# Optimizers are made by the engine, after it has wrapped the model: FSDP and ZeRO replace the parameters.
OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        grad_norm: norm of the whole model's gradient over all ranks, before clipping; None where the engine does
            not compute it.
        skipped: the step was left out (a non-finite gradient), and the weights are as before.
    """

    grad_norm: float | None
    skipped: bool = False


@runtime_checkable
class TrainingEngine(Protocol):
    """Data parallelism, gradient clipping and the optimizer of one library around a model."""

    @property
    def module(self) -> nn.Module:
        """The model as the factory built it."""
        ...

    precision: Precision

    updates: int  # how often the weights have changed: by steps that were not skipped, and by loading

    @property
    def table(self) -> WeightTable:
        """The model's weight layouts, collected before it was wrapped."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with whatever the library does around it."""
        ...

    def computing(self) -> AbstractContextManager[Any]:
        """A context in which the model's operations compute in the dtype that the engine's precision names."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`, averaged over the data axis; every rank's loss counts the same."""
        ...

    def train_batch(
        self, micro_batches: Sequence[MicroBatch], loss: SumLoss | None = None, tokens: CountTokens | None = None
    ) -> BatchResult:
        """Run forward and backward of one step's micro-batches, weighted by tokens: see `polyshard.train_batch`.

        It replaces `__call__`, `backward` and `accumulate`, which average the means of micro-batches and ranks.
        """
        ...

    def step(self) -> StepResult:
        """Clip, update the weights, and clear the gradients."""
        ...

    def zero_grad(self) -> None:
        """Forget accumulated gradients."""
        ...

    def set_learning_rate(self, lr: float) -> None:
        """For the next step on."""
        ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Around forward and backward of all micro-batches but the last: gradients are not yet communicated."""
        ...

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter's name as built, and this rank's tensor-parallel shard, whole over the data axis.

        A collective over the data axis: every rank iterates to the end.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Set parameters from this rank's tensor-parallel shards, by their names as built."""
        ...

    def weight_pieces(self) -> Iterator[Piece]:
        """This rank's own run of every parameter, without communication; slot `"weight"`."""
        ...

    def weights_written(self) -> None:
        """After values were written into the weight pieces: refresh the library's own copies. A collective."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state on this rank, made where no step has been taken yet."""
        ...

    def optimizer_written(self, step: int, lr: float) -> None:
        """After values were written into the optimizer's pieces: go on from update `step` with this rate."""
        ...

    def close(self) -> None:
        """Release what the library holds for this engine."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """One parallelism library."""

    name: str
    capabilities: Capabilities
    requirement: Requirement
    linear: Any

    def initialize(self, layout: ParallelLayout | None = None, **options: Any) -> ParallelContext:
        """Make process groups from torchrun's environment, or stand alone in one process."""
        ...

    def adopt(self, context: ParallelContext) -> ParallelContext:
        """This library's layers on groups that another one made (inside a vLLM worker, say)."""
        ...

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> TrainingEngine:
        """The library's training engine around a model built with `context`."""
        ...

    def shutdown(self, context: ParallelContext) -> None:
        """Destroy what `initialize` made; afterwards it may be called again."""
        ...
