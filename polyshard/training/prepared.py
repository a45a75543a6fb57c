"""Errors of one rank before a step's first pass, told to the ranks that would wait for it.

The step begins with a collective in any case: a flag in it says whether a rank has failed. Only then do the ranks
exchange texts, so that a step without an error has no further collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from polyshard.core.batch import IGNORED, MicroBatch
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.errors import ConfigurationError, RankFailureError
from polyshard.core.model_weights import gather_over
from polyshard.core.weight_table import WeightTable
from polyshard.layers.token_ids import check_labels
from polyshard.layers.vocabulary import looks_up

T = TypeVar("T")

_NOT_BEGUN = "the step was not begun: "


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return what an action returned, or the error that it raised. The action must not communicate."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def told_error(error: Exception | None, axis: ParallelAxis, context: ParallelContext) -> Exception:
    """Return the error to raise here, after any rank of an axis had one. A collective over the axis.

    Args:
        error: of this rank.
        axis: the ranks that exchange their errors.
        context: the parallel context.

    Returns:
        This rank's error; of a rank without one, a `RankFailureError` that names the ranks and their errors.
    """
    mine = None
    if isinstance(error, RankFailureError):
        mine = (str(error).removeprefix(_NOT_BEGUN), error.ranks)
    elif error is not None:
        rank = axis.ranks[axis.rank]
        mine = (f"rank {rank} raised {type(error).__name__}: {error}", (rank,))
    with context.guard(f"{axis.name} errors"):
        gathered = gather_over(axis, mine)
    if error is not None:
        return error
    told = [item for item in gathered if item is not None]
    return RankFailureError(
        f"{_NOT_BEGUN}{'; '.join(dict.fromkeys(text for text, _ in told))}",
        tuple(dict.fromkeys(rank for _, ranks in told for rank in ranks)),
    )


def vocabulary_of_head(model: nn.Module, table: WeightTable) -> int | None:
    """Return the number of tokens that the head of a built model tells apart; None unless it has one size of head.

    An embedding counts if a head is tied to it: else its vocabulary may be another.
    """
    embeddings = {id(p) for module in model.modules() if looks_up(module) for p in module.parameters()}
    named = dict(model.named_parameters())
    sizes = {
        segment.size
        for name, entry in table.items()
        for segment in entry.layout.segments
        if segment.pad_multiple and (entry.tied_parameters or id(named[name]) not in embeddings)
    }
    return sizes.pop() if len(sizes) == 1 else None


def check_default_labels(micro_batches: Iterable[MicroBatch], vocab_size: int | None) -> None:
    """Check the labels of the default loss: their dtype, and that they are in the vocabulary of the head.

    Args:
        micro_batches: of a step; their labels are tensors.
        vocab_size: of the head; None if it is unknown, so that the loss checks the range.

    Raises:
        ConfigurationError: the labels are no integers.
        ValueError: a label is outside the vocabulary (on the CPU).
    """
    for micro_batch in micro_batches:
        labels = micro_batch["labels"]
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            raise ConfigurationError(
                f"labels have the wrong dtype: got {labels.dtype}, expected int64 token IDs. Convert them, or pass "
                "loss= and tokens=."
            )
        if vocab_size is not None:
            check_labels(labels, vocab_size, IGNORED)
