"""The gradient of one training step: the mean over the tokens of all micro-batches and all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyshard.core.batch import IGNORED, BatchResult, CountTokens, MicroBatch, SumLoss
from polyshard.core.context import ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.experts.observed import expert_layers, router_loss
from polyshard.experts.step_routing import StepRouting
from polyshard.layers.lm_loss import lm_loss
from polyshard.training.prepared import attempt, check_default_labels, told_error

if TYPE_CHECKING:
    from polyshard.core.adapter import TrainingEngine

logger = logging.getLogger(__name__)


def train_batch(
    engine: TrainingEngine,
    context: ParallelContext,
    micro_batches: Sequence[MicroBatch],
    loss: SumLoss | None = None,
    tokens: CountTokens | None = None,
) -> BatchResult:
    """Run forward and backward for one step's micro-batches; `engine.step()` then updates the weights.

    The gradient equals that of a single process with the full batch: the sum of all tokens' losses, divided by the
    number of tokens of all micro-batches and all data-parallel and context-parallel ranks. The balance losses of a
    mixture of experts are added to it, but not to the result. Micro-batches and ranks may
    have different numbers of labels, or none. One small all-reduce before the first backward pass exchanges the number
    of tokens, and another one after the last exchanges the loss.

    Args:
        engine: a training engine, which averages gradients over the replicas.
        context: the engine's parallel context.
        micro_batches: this rank's micro-batches: keyword arguments of the model's forward, and `labels`, which only the
            loss reads: `[batch, seq]` or `[tokens]`, the token after each token, or -100 to ignore it. Every rank must
            pass the same number; ranks that share an activation must pass the same data.
        loss: `(output of the model's forward, micro-batch)` to the **sum** of this rank's losses, a scalar. By default
            the cross-entropy of `module.compute_logits(output)` with `labels`, by `polyshard.lm_loss`. With your own
            `loss` and `tokens`, `labels` may contain anything.
        tokens: returns the number of tokens of a micro-batch that count, a scalar tensor; by default the number of
            labels other than -100.

    Raises:
        ConfigurationError: there is no micro-batch, ranks have different numbers of them, a micro-batch has no labels
            and `tokens` is not given, the model has no `compute_logits` and `loss` is not given, the loss is no scalar
            with a gradient, or `tokens` returns no number.
        RankFailureError: another replica has raised an error before its first pass.

    Examples:
        >>> context = ps.initialize("torch")
        >>> engine = ps.load_adapter("torch").engine(torch.nn.Linear(4, 2), ps.AdamW(), context)
        >>> batch = {"input": torch.ones(3, 4), "labels": torch.tensor([1, 0, -100])}
        >>> def loss(output, batch):
        ...     return torch.nn.functional.cross_entropy(output, batch["labels"], reduction="sum")
        >>> train_batch(engine, context, [batch, batch], loss=loss).tokens
        tensor(4., dtype=torch.float64)
    """
    routing = StepRouting(engine.module)
    prepared, error = attempt(lambda: _prepare(engine, context, micro_batches, loss, tokens, routing))
    replicas = replica_axis(context)
    total = total_tokens([] if prepared is None else prepared[1], context, error)
    assert prepared is not None, "total_tokens raises the error"
    sum_loss, counted = prepared
    balanced = balanced_tokens(counted, engine.module, context)
    # Engines average over the replicas, so the sum is multiplied by their number.
    factor = replicas.size / total.clamp_min(1.0)
    summed = torch.zeros((), dtype=torch.float64, device=context.device)
    last = len(micro_batches) - 1
    for index, micro_batch in enumerate(micro_batches):
        arguments = {name: value for name, value in micro_batch.items() if name != "labels"}
        with routing.micro_batch(index), nullcontext() if index == last else engine.accumulate():
            with engine.computing():
                value = sum_loss(engine(**arguments), micro_batch)
            check_summed(value)
            balance = router_loss(engine.module)
            share = value if balance is None else value + balance.to(value.dtype) * balanced[index].to(value.dtype)
            check_has_gradient(share)
            engine.backward(share * factor.to(value.dtype))
        summed += value.detach().double()
    if replicas.size > 1:
        assert replicas.collectives is not None
        summed = replicas.collectives.all_reduce(summed)
    return BatchResult(loss=summed / total.clamp_min(1.0), tokens=total)


def eval_batch(
    engine: TrainingEngine,
    context: ParallelContext,
    micro_batches: Sequence[MicroBatch],
    loss: SumLoss | None = None,
    tokens: CountTokens | None = None,
) -> BatchResult:
    """Return the loss of micro-batches without gradients; the arguments are those of `train_batch`."""
    routing = StepRouting(engine.module)
    prepared, error = attempt(lambda: _prepare(engine, context, micro_batches, loss, tokens, routing))
    total = total_tokens([] if prepared is None else prepared[1], context, error)
    assert prepared is not None, "total_tokens raises the error"
    sum_loss, _ = prepared
    summed = torch.zeros((), dtype=torch.float64, device=context.device)
    with torch.no_grad():
        for index, micro_batch in enumerate(micro_batches):
            arguments = {name: value for name, value in micro_batch.items() if name != "labels"}
            with routing.micro_batch(index), engine.computing():
                value = sum_loss(engine(**arguments), micro_batch)
            check_summed(value)
            summed += value.double()
    replicas = replica_axis(context)
    if replicas.size > 1:
        assert replicas.collectives is not None
        summed = replicas.collectives.all_reduce(summed)
    return BatchResult(loss=summed / total.clamp_min(1.0), tokens=total)


def _prepare(
    engine: TrainingEngine,
    context: ParallelContext,
    micro_batches: Sequence[MicroBatch],
    loss: SumLoss | None,
    tokens: CountTokens | None,
    routing: StepRouting,
) -> tuple[SumLoss, list[torch.Tensor]]:
    """Return the loss, and the number of tokens of each micro-batch that count, without communication."""
    check_micro_batches(micro_batches)
    check_functions(loss, tokens)
    sum_loss = lm_loss_of(engine.module, context) if loss is None else loss
    routing.check(len(micro_batches))
    counted = counted_tokens(micro_batches, tokens, context)
    if loss is None:
        check_default_labels(micro_batches, getattr(engine, "head_vocabulary", None))
    return sum_loss, counted


def counted_tokens(
    micro_batches: Sequence[MicroBatch], tokens: CountTokens | None, context: ParallelContext
) -> list[torch.Tensor]:
    """Return the number of tokens of each micro-batch that count, as float64 scalars."""
    return [
        _as_count((tokens or count_labels)(micro_batch), index, context)
        for index, micro_batch in enumerate(micro_batches)
    ]


def _as_count(count: Any, index: int, context: ParallelContext) -> torch.Tensor:
    try:
        found = torch.as_tensor(count, device=context.device).double()
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.numel() != 1 or (found.device.type == "cpu" and not 0.0 <= float(found) < math.inf):
        got = repr(count) if found is None or found.numel() == 1 else f"shape {tuple(found.shape)}"
        raise ConfigurationError(
            f"tokens= returns no number of tokens for micro-batch {index}: got {got}, expected a scalar of 0 or more, "
            "such as mask.sum()."
        )
    return found.reshape(())


def check_summed(value: Any) -> None:
    """Raise `ConfigurationError` unless a loss has returned a scalar tensor."""
    if not isinstance(value, torch.Tensor) or value.dim():
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else value
        raise ConfigurationError(f"the loss has the wrong shape: got {got}, expected a scalar tensor, the sum.")


def check_has_gradient(loss: torch.Tensor) -> None:
    """Raise `ConfigurationError` if a loss cannot be differentiated, for which torch would name no reason."""
    if not loss.requires_grad:
        raise ConfigurationError(
            "the loss does not depend on the model's output, so that it has no gradient. Multiply the output by zero "
            "where a micro-batch has no tokens."
        )


def check_functions(loss: Any, tokens: Any) -> None:
    """Raise `ConfigurationError` if a loss or a count of tokens is given that cannot be called."""
    for name, function, example in (
        ("loss", loss, "the output and a micro-batch, which returns the sum of its losses"),
        ("tokens", tokens, "a micro-batch, which returns its number of tokens"),
    ):
        if function is not None and not callable(function):
            raise ConfigurationError(f"{name} is invalid: got {function!r}, expected None or a function of {example}.")


def total_tokens(
    counted: Sequence[torch.Tensor], context: ParallelContext, error: Exception | None = None
) -> torch.Tensor:
    """Return the number of tokens that count over all micro-batches and replicas, in float64. A collective.

    Args:
        counted: of each micro-batch of this rank.
        context: the parallel context.
        error: why this rank has no micro-batches. It is raised, and told to the other replicas.

    Raises:
        ConfigurationError: ranks have different numbers of micro-batches.
        RankFailureError: another replica has an error.
    """
    mine = torch.zeros((), dtype=torch.float64, device=context.device) if error else torch.stack([*counted]).sum()
    replicas = replica_axis(context)
    if replicas.size == 1:
        if error is not None:
            raise error
        return mine
    assert replicas.collectives is not None
    # n is the same on all ranks if and only if ranks * sum(n²) = sum(n)²: every rank reaches the same decision.
    number = float(len(counted))
    flags = mine.new_tensor((number, number**2, float(error is not None)))
    tokens, first, second, failed = replicas.collectives.all_reduce(torch.stack((mine, *flags))).unbind()
    if bool(failed):
        raise told_error(error, replicas, context)
    if bool(replicas.size * second != first**2):
        raise ConfigurationError(
            f"ranks have unequal numbers of micro-batches: got {len(counted)} on this rank, {float(first):.0f} on all "
            f"{replicas.size}. Pass the same number on every rank; labels of {IGNORED} only contribute nothing."
        )
    return tokens


def balanced_tokens(
    counted: Sequence[torch.Tensor], model: nn.Module, context: ParallelContext
) -> Sequence[torch.Tensor]:
    """Return the factor of each micro-batch's balance losses, which are means over this rank's tokens of it.

    Context-parallel ranks have equally many tokens of a sequence, but not equally many labels. This is a collective
    over the context axis if the model has balance losses.
    """
    axis = context.axis("context")
    mine = torch.stack([*counted])
    if axis.size == 1 or not any(layer.balance.has_loss for _, layer in expert_layers(model)):
        return mine.unbind()
    assert axis.collectives is not None
    return (axis.collectives.all_reduce(mine) / axis.size).unbind()


def check_micro_batches(micro_batches: Any) -> None:
    """Check that a step has a list of micro-batches.

    Raises:
        ConfigurationError: there is none, it is a micro-batch itself, or one of them is no mapping.
    """
    if isinstance(micro_batches, Mapping):
        raise ConfigurationError(
            f"micro_batches is one micro-batch: got a mapping of {', '.join(map(str, micro_batches))}, expected a list "
            "of such mappings. Pass [micro_batch]."
        )
    if not isinstance(micro_batches, Sequence) or isinstance(micro_batches, (str, bytes)):
        raise ConfigurationError(
            f"micro_batches is no list: got {type(micro_batches).__name__}, expected a list of mappings, the arguments "
            "of the model's forward and labels. Pass list(...) of it."
        )
    if not micro_batches:
        raise ConfigurationError("micro_batches is empty. Pass at least one micro-batch.")
    for index, micro_batch in enumerate(micro_batches):
        if not isinstance(micro_batch, Mapping):
            raise ConfigurationError(
                f"micro-batch {index} is no mapping: got {type(micro_batch).__name__}, expected the arguments of the "
                "model's forward by name, and labels."
            )


def warn_of_unshifted_labels(micro_batches: Any) -> None:
    """Warn if the labels are the tokens themselves and not the tokens after them, as in transformers.

    This is for the first micro-batch. Values that are not lists of micro-batches are left to `check_micro_batches`.
    """
    if not isinstance(micro_batches, Sequence) or not micro_batches or not isinstance(micro_batches[0], Mapping):
        return
    micro_batch = micro_batches[0]
    ids, labels = micro_batch.get("input_ids"), micro_batch.get("labels")
    if not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor) or ids.shape != labels.shape:
        return
    counted = labels != IGNORED
    after = counted[..., :-1]
    same, following = (labels == ids)[counted], (labels[..., :-1] == ids[..., 1:])[after]
    if bool(same.numel() > 1 and same.all() and not following.all()):
        logger.warning(
            "labels are the tokens themselves, so the model learns to copy: got labels equal to input_ids, expected "
            "the token after each token. Shift them by one"
        )


def count_labels(micro_batch: MicroBatch) -> torch.Tensor:
    """Return the number of labels other than -100, a scalar.

    Raises:
        ConfigurationError: the micro-batch has no labels, or not as a tensor.
    """
    if "labels" not in micro_batch:
        raise ConfigurationError(
            f"a micro-batch has no labels: got {', '.join(micro_batch)}. Add labels, or pass tokens=."
        )
    if not isinstance(micro_batch["labels"], torch.Tensor):
        raise ConfigurationError(
            f"labels are no tensor: got {type(micro_batch['labels']).__name__}, expected int64 token IDs. Convert "
            "them, or pass loss= and tokens=."
        )
    return (micro_batch["labels"] != IGNORED).sum()


def lm_loss_of(module: Any, context: ParallelContext) -> SumLoss:
    """Return the default loss of a model with `compute_logits`.

    Raises:
        ConfigurationError: the model has none.
    """
    if not callable(getattr(module, "compute_logits", None)):
        raise ConfigurationError(
            f"{type(module).__name__} has no compute_logits. Pass loss=, which sums the losses of a micro-batch."
        )

    def summed(hidden: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        return lm_loss(hidden, module.compute_logits, micro_batch["labels"], context, reduction="sum")

    return summed
