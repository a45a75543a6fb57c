"""Embedding, head and loss over a vocabulary that is sharded over the tensor axis."""

from __future__ import annotations

import logging
import math
import numbers
from typing import Any, Literal, overload

import torch
from torch import nn

from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.linear_adapter import adapter_with, choose_adapter, name_of, tensor_rank_and_size
from polyshard.core.weight_sharding import Segment, WeightLayout
from polyshard.core.weight_table import attach_layouts
from polyshard.layers.token_ids import check_ids_of, check_labels, check_of_logits, check_present

logger = logging.getLogger(__name__)

_LOOKUP = "polyshard_lookup"  # marks embeddings, whose class is each library's own


def vocab_embedding(
    num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext, *, linear: Any = None
) -> nn.Module:
    """Create a token embedding whose rows are sharded over the tensor axis, padded if they do not divide evenly.

    Returns:
        A module from token IDs `[...]` to `[..., embedding_dim]`, replicated on every rank, or sharded along the
        sequence under sequence parallel. In training, an ID outside `[0, num_embeddings)` raises an IndexError that
        names it; on a GPU, an asynchronous assertion fails.

    Examples:
        >>> embedding = ps.vocab_embedding(10, 4, ps.initialize("torch"))
        >>> embedding(torch.tensor([1, 9])).shape
        torch.Size([2, 4])
    """
    adapter = adapter_with(choose_adapter(linear, parallel_context), "create_vocab_embedding")
    rank, size = tensor_rank_and_size(parallel_context)
    layer = adapter.create_vocab_embedding(num_embeddings, embedding_dim, parallel_context)
    layout = vocab_layout((num_embeddings, embedding_dim), adapter)
    attach_layouts(layer, {"weight": layout}, rank, size)
    if parallel_context.attention is None:  # a serving engine checks the IDs of its requests
        check_ids_of(layer, num_embeddings)
    setattr(layer, _LOOKUP, True)
    return layer


def looks_up(module: nn.Module) -> bool:
    """Return whether a module reads rows of its weight, by token IDs, and does not multiply by it."""
    return isinstance(module, nn.Embedding) or getattr(module, _LOOKUP, False)


def lm_head(
    hidden_size: int,
    vocab_size: int,
    parallel_context: ParallelContext,
    *,
    bias: bool = False,
    tied_to: nn.Module | None = None,
    linear: Any = None,
) -> nn.Module:
    """Create the output projection onto the vocabulary, sharded over the tensor axis.

    Args:
        hidden_size: size of the hidden states.
        vocab_size: logical vocabulary size.
        parallel_context: the parallel context.
        bias: add a bias.
        tied_to: the embedding whose weight this head shares, created by the same adapter.
        linear: the linear adapter of another library for this layer.

    Returns:
        A module `[..., hidden_size] -> [..., local vocabulary]`; padding columns are -inf. Pass the output to
        `vocab_parallel_cross_entropy`, or to `gather_logits` for full logits.

    Examples:
        >>> head = ps.lm_head(4, 10, ps.initialize("torch"))
        >>> head(torch.ones(3, 4)).shape
        torch.Size([3, 10])
    """
    adapter = adapter_with(choose_adapter(linear, parallel_context), "create_lm_head")
    rank, size = tensor_rank_and_size(parallel_context)
    layer = adapter.create_lm_head(hidden_size, vocab_size, parallel_context, bias=bias, tied_to=tied_to)
    layouts = {"weight": vocab_layout((vocab_size, hidden_size), adapter)}
    if bias:
        layouts["bias"] = vocab_layout((vocab_size,), adapter)
    attach_layouts(layer, layouts, rank, size)
    return layer


@overload
def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    return_z_loss: Literal[False] = ...,
    linear: Any = ...,
) -> torch.Tensor: ...


@overload
def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    return_z_loss: Literal[True],
    linear: Any = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    linear: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of vocabulary-parallel logits, with the semantics of torch's `cross_entropy`.

    Args:
        logits: `[..., local vocabulary]`, any float dtype, not modified; computed in float32 or wider.
        targets: `[...]`, token IDs; targets equal to `ignore_index` do not count in loss, gradient and mean.
        parallel_context: the parallel context.
        vocab_size: logical size, if the vocabulary is padded; by default the local size times the tensor size, without
            the columns whose logits are -inf.
        ignore_index: as in torch.
        reduction: `"mean"`, `"sum"` or `"none"`. The mean is over the labels of this call, including those of all ranks
            of the context axis, but not of other data-parallel ranks or micro-batches. If these have different numbers
            of labels, train with `engine.train_batch`, which weights by tokens. The mean over no label is 0 with
            gradients of 0. Sums and unreduced losses cover this rank's tokens.
        label_smoothing: as in torch, over the logical vocabulary.
        z_loss: factor of the square of the logits' log-sum-exp, which is added to each token's loss (PaLM, OLMo). A
            positive factor takes the torch adapter's loss.
        return_z_loss: also return the part of the loss that is the z-loss, detached, reduced in the same way.
        linear: the linear adapter whose loss is used.

    Returns:
        A scalar, or `[...]` with `"none"`, the same on every tensor-parallel rank; float32 (float64 for float64
        logits). With `return_z_loss`, a pair of these.

    Raises:
        ValueError: the reduction is unknown, the label smoothing is outside [0, 1], `z_loss` is negative, `vocab_size`
            is larger than the logits, targets have another shape or no integers, or a label is neither in the
            vocabulary nor `ignore_index` (on a GPU, an asynchronous assertion).

    Examples:
        >>> context = ps.initialize("torch")
        >>> ps.vocab_parallel_cross_entropy(torch.zeros(3, 8), torch.tensor([1, 2, -100]), context)
        tensor(2.0794)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is invalid: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    if not isinstance(label_smoothing, numbers.Real) or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is invalid: got {label_smoothing!r}, expected a number in [0, 1]")
    check_z_loss(z_loss)
    check_of_logits(targets, logits, vocab_size, _tensor_size(parallel_context))
    check_labels(targets, vocab_size or logits.shape[-1] * _tensor_size(parallel_context), ignore_index)
    losses, squares = token_losses(
        logits,
        targets,
        parallel_context,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        linear=linear,
    )

    def reduced(each: torch.Tensor) -> torch.Tensor:
        if reduction == "none":
            return each
        if reduction == "sum":
            return each.sum()
        return mean_loss(each.sum(), (targets != ignore_index).sum(), parallel_context.axis("context"))

    return (reduced(losses), reduced(squares)) if return_z_loss else reduced(losses)


def check_z_loss(z_loss: float) -> None:
    """Raise `ValueError` unless the factor of the z-loss is a finite number that is not negative."""
    if not isinstance(z_loss, numbers.Real) or not (z_loss >= 0.0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss is invalid: got {z_loss!r}, expected 0 or a positive number")


def token_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    linear: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token, `[...]`, and its z-loss; `vocab_parallel_cross_entropy` checks the arguments."""
    adapter = adapter_with(choose_adapter(linear, parallel_context), "vocab_parallel_cross_entropy")
    if label_smoothing and not getattr(adapter, "smooths_labels", True):
        logger.info(
            "%s cannot smooth labels over the full vocabulary; the torch adapter's loss is used", name_of(adapter)
        )
        adapter = load_adapter("torch").linear
    settings: dict[str, Any] = {
        "vocab_size": vocab_size or logits.shape[-1] * _tensor_size(parallel_context),
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    if z_loss:
        torch_adapter: Any = load_adapter("torch").linear
        losses, squares = torch_adapter.cross_entropy_with_z_loss(
            logits, targets, parallel_context, z_loss=z_loss, **settings
        )
    else:
        losses = adapter.vocab_parallel_cross_entropy(logits, targets, parallel_context, **settings)
        squares = losses.detach().new_zeros(losses.shape)
    if vocab_size is None:  # then a label may select a padding column
        check_present(losses, targets)
    return losses, squares


def _tensor_size(context: ParallelContext) -> int:
    return context.get_tensor_parallel_world_size()


def mean_loss(total: torch.Tensor, count: torch.Tensor, axis: ParallelAxis) -> torch.Tensor:
    """Return the mean over the labels of all ranks of the context axis, from this rank's sum; 0 if there are none.

    The gradient is that of this rank's tokens times the size of the axis, because engines average over the replicas.
    """
    if axis.size == 1:
        return total / count.clamp_min(1)
    assert axis.collectives is not None
    sums = axis.collectives.all_reduce(torch.stack((total.detach().double(), count.double())))
    tokens = sums[1].clamp_min(1.0)
    share = total * (axis.size / tokens).to(total.dtype)
    return share + ((sums[0] / tokens).to(total.dtype) - share).detach()


def gather_logits(logits: torch.Tensor, parallel_context: ParallelContext, vocab_size: int) -> torch.Tensor:
    """Return full logits `[..., vocab_size]` from those of a vocabulary-parallel head, on every rank, without gradient.

    Examples:
        >>> ps.gather_logits(torch.zeros(2, 8), ps.initialize("torch"), vocab_size=7).shape
        torch.Size([2, 7])
    """
    axis = parallel_context.axis("tensor")
    if axis.size > 1:
        assert axis.collectives is not None
        logits = axis.collectives.all_gather(logits.detach(), logits.dim() - 1)
    return logits[..., :vocab_size]


def vocab_layout(shape: tuple[int, ...], adapter: Any) -> WeightLayout:
    """Return a layout with rows sharded over the tensor axis and the padding of the adapter."""
    padding = getattr(adapter, "vocab_padding", 1)
    return WeightLayout(shape=shape, dim=0, segments=(Segment(size=shape[0], pad_multiple=padding),))
