"""One training step's gradient: the mean over the tokens of all micro-batches and all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from polyshard.core.batch import IGNORED, BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.layers.vocabulary import vocab_parallel_cross_entropy

if TYPE_CHECKING:
    from polyshard.core.adapter import TrainingEngine


def train_batch(
    engine: TrainingEngine,
    context: ParallelContext,
    micro_batches: Sequence[MicroBatch],
    loss: SumLoss | None = None,
    tokens: CountTokens | None = None,
) -> BatchResult:
    """Run forward and backward of one step's micro-batches; `engine.step()` then updates the weights.

    The gradient is that of one process that holds the whole batch: the sum of the losses of all tokens, divided by the
    number of tokens of all micro-batches and all data-parallel and context-parallel ranks. Micro-batches and ranks may
    hold unequal numbers of labels, or none. The number of tokens is exchanged before the first backward pass, in one
    small all-reduce; the loss in another after the last.

    Args:
        engine: a training engine around a model, which averages gradients over the replicas.
        context: the engine's.
        micro_batches: this rank's: keyword arguments of the model's forward, and `labels`, which the loss alone reads:
            `[batch, seq]` or `[tokens]`, the token after each token, -100 where none counts. As many on every rank;
            all ranks that share an activation pass the same.
        loss: `(output of the model's forward, micro-batch)` to the **sum** of this rank's losses, a scalar. Default:
            cross-entropy of `module.compute_logits(output)` with `labels`. With a `loss` and `tokens` of your own,
            `labels` may hold whatever they need.
        tokens: how many tokens of a micro-batch count, a scalar tensor; default the labels other than -100.

    Raises:
        ConfigurationError: no micro-batch, unequal numbers of them over the ranks, a micro-batch without labels whose
            tokens are not counted by `tokens`, or a model without `compute_logits` and no `loss`.
    """
    if not micro_batches:
        raise ConfigurationError("train_batch needs at least one micro-batch: got none")
    sum_loss = _cross_entropy(engine, context) if loss is None else loss
    counted = [(tokens or _labelled)(micro_batch) for micro_batch in micro_batches]
    replicas = replica_axis(context)
    total = _total(counted, context)
    # Engines average over the replicas, so the share of one replica counts that many times.
    factor = replicas.size / total.clamp_min(1.0)
    summed = torch.zeros((), dtype=torch.float64, device=context.device)
    last = len(micro_batches) - 1
    for index, micro_batch in enumerate(micro_batches):
        arguments = {name: value for name, value in micro_batch.items() if name != "labels"}
        with nullcontext() if index == last else engine.accumulate():
            with engine.computing():
                value = sum_loss(engine(**arguments), micro_batch)
            if value.dim():
                raise ConfigurationError(f"the loss must be a scalar sum over tokens: got shape {tuple(value.shape)}")
            engine.backward(value * factor.to(value.dtype))
        summed += value.detach().double()
    if replicas.size > 1:
        assert replicas.collectives is not None
        summed = replicas.collectives.all_reduce(summed)
    return BatchResult(loss=summed / total.clamp_min(1.0), tokens=total)


def _total(counted: Sequence[torch.Tensor], context: ParallelContext) -> torch.Tensor:
    """Tokens that count over all micro-batches and replicas, float64; refuse unequal numbers of micro-batches."""
    mine = torch.stack([torch.as_tensor(count, device=context.device).double() for count in counted]).sum()
    replicas = replica_axis(context)
    if replicas.size == 1:
        return mine
    assert replicas.collectives is not None
    # n is the same on all ranks if and only if ranks * sum(n²) = sum(n)²: every rank comes to the same verdict.
    number = float(len(counted))
    figures = replicas.collectives.all_reduce(torch.stack((mine, *mine.new_tensor((number, number**2)))))
    tokens, first, second = figures.unbind()
    if bool(replicas.size * second != first**2):
        raise ConfigurationError(
            f"ranks have unequal numbers of micro-batches: got {len(counted)} on this rank, {float(first):.0f} on all "
            f"{replicas.size}. Pass as many on every rank; one whose labels are all {IGNORED} adds nothing."
        )
    return tokens


def _labelled(micro_batch: MicroBatch) -> torch.Tensor:
    if "labels" not in micro_batch:
        raise ConfigurationError(
            f"a micro-batch has no labels: got {', '.join(micro_batch)}. Add labels, or count its tokens with tokens="
        )
    return (micro_batch["labels"] != IGNORED).sum()


def _cross_entropy(engine: TrainingEngine, context: ParallelContext) -> SumLoss:
    """The default loss of a model with `compute_logits`."""
    module: Any = engine.module
    if not callable(getattr(module, "compute_logits", None)):
        raise ConfigurationError(
            f"{type(module).__name__} has no compute_logits: pass loss=, the summed losses of a micro-batch's tokens"
        )

    def summed(hidden: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        logits = module.compute_logits(hidden)
        return vocab_parallel_cross_entropy(logits, micro_batch["labels"], context, reduction="sum")

    return summed
