"""Parallel layers as functions of a context: the only way a model asks for one, whatever library builds it.

`LinearAdapter` is the protocol that a library's layers are brought under. Only `create_column_parallel` is required;
a model that uses row-parallel layers needs `create_row_parallel` too. The optional methods, each used where the
adapter has it and otherwise built from the required ones or from the torch adapter's:

    create_merged_column_parallel(input_size, output_sizes, parallel_context, bias=False)
    create_qkv_parallel(hidden_size, num_heads, num_kv_heads, head_dim, parallel_context, bias=False)
    create_vocab_embedding(num_embeddings, embedding_dim, parallel_context)
    create_lm_head(hidden_size, vocab_size, parallel_context, bias=False, tied_to=None)
    create_norm(hidden_size, parallel_context, eps, partial_gradient)
    vocab_parallel_cross_entropy(logits, targets, parallel_context, vocab_size, ignore_index, reduction,
                                 label_smoothing)
    vocab_padding: int    # vocabulary rows are padded to a multiple of this
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import AdapterError, LayoutError
from polyshard.core.weight_layout import Segment, WeightLayout, replicated
from polyshard.core.weight_table import attach_layouts

logger = logging.getLogger(__name__)


@runtime_checkable
class LinearAdapter(Protocol):
    """Makes one library's parallel layers; a class with static methods will do, as will a module."""

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: Any, bias: bool = False
    ) -> nn.Module:
        """A layer `[..., input_size] -> [..., output_size / tensor size]` whose weight's rows are sharded.

        Its parameters are `weight` `[output_size / tensor size, input_size]` and, with `bias`, `bias`.
        """
        ...


@runtime_checkable
class FullLinearAdapter(LinearAdapter, Protocol):
    """A linear adapter that makes row-parallel layers too."""

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: Any, bias: bool = False
    ) -> nn.Module:
        """A layer `[..., input_size / tensor size] -> [..., output_size]`; the bias is added once, after the sum."""
        ...


def column_parallel(
    input_size: int,
    output_size: int | Sequence[int],
    parallel_context: ParallelContext,
    *,
    bias: bool = False,
    names: Sequence[str] | None = None,
    linear: Any = None,
    **options: Any,
) -> nn.Module:
    """A linear layer whose output features are sharded over the tensor axis.

    Args:
        input_size: size of the input's last dimension; the input is whole on every rank (under sequence parallel:
            sharded along the sequence, and gathered inside).
        output_size: features, or the features of several fused projections, each sharded on its own: `[f, f]`.
        parallel_context: where this process stands.
        bias: add a bias, sharded like the output.
        names: of the fused projections in a checkpoint (`["gate_proj", "up_proj"]`); without them the fused
            tensor is stored as one.
        linear: another library's layers for this one layer; default `parallel_context.linear`.
        options: passed on to the adapter.

    Returns:
        A module `[..., input_size] -> [..., sum(output sizes) / tensor size]`; with several sizes the local output
        holds the local part of each, one after the other.

    Raises:
        LayoutError: a size is not divisible by the tensor-parallel size.
    """
    sizes = (output_size,) if isinstance(output_size, int) else tuple(output_size)
    if names is not None and len(names) != len(sizes):
        raise LayoutError(f"{len(sizes)} output sizes need as many names, got {list(names)}")
    segments = tuple(
        Segment(size=size, name=name) for size, name in zip(sizes, names or [None] * len(sizes), strict=True)
    )
    rank, size = _stand(parallel_context)
    _check_divides("column_parallel", segments, rank, size)
    adapter = _adapter(linear, parallel_context)
    merged = getattr(adapter, "create_merged_column_parallel", None)
    if len(sizes) > 1 and merged is not None:
        layer = merged(input_size, list(sizes), parallel_context, bias=bias, **options)
    else:
        layer = adapter.create_column_parallel(input_size, sum(sizes), parallel_context, bias=bias, **options)
    total = sum(sizes)
    return _finish(layer, adapter, input_size, total, segments, bias, rank, size)


def row_parallel(
    input_size: int,
    output_size: int,
    parallel_context: ParallelContext,
    *,
    bias: bool = False,
    linear: Any = None,
    **options: Any,
) -> nn.Module:
    """A linear layer whose input features are sharded: the counterpart of `column_parallel`.

    Returns:
        A module `[..., input_size / tensor size] -> [..., output_size]`, summed over the tensor axis (under sequence
        parallel: and scattered along the sequence). The bias is added once.

    Raises:
        LayoutError: `input_size` is not divisible by the tensor-parallel size.
        AdapterError: the adapter makes no row-parallel layers.
    """
    segments = (Segment(size=input_size),)
    rank, size = _stand(parallel_context)
    _check_divides("row_parallel", segments, rank, size)
    adapter = _adapter(linear, parallel_context)
    create = getattr(adapter, "create_row_parallel", None)
    if create is None:
        raise AdapterError(
            f"{_name(adapter)} makes no row-parallel layers: give it a method "
            "create_row_parallel(input_size, output_size, parallel_context, bias=False)"
        )
    layer = create(input_size, output_size, parallel_context, bias=bias, **options)
    _unwrap_tuples(layer, adapter)
    layouts = {"weight": WeightLayout(shape=(output_size, input_size), dim=1, segments=segments)}
    if bias:
        layouts["bias"] = replicated((output_size,))
    attach_layouts(layer, layouts, rank, size)
    return layer


def qkv_parallel(
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    parallel_context: ParallelContext,
    *,
    bias: bool = False,
    names: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    linear: Any = None,
    **options: Any,
) -> nn.Module:
    """The fused query, key and value projection, sharded by heads.

    Where the tensor axis has more ranks than there are KV heads, each KV head is held by several ranks, and its
    gradient is summed over them.

    Returns:
        A module `[..., hidden_size] -> [..., (q + 2 kv) head_dim]` with this rank's `q = num_heads / tensor size`
        and `kv = max(1, num_kv_heads / tensor size)`.

    Raises:
        LayoutError: the heads do not divide.
    """
    if num_heads % num_kv_heads:
        raise LayoutError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    rank, size = _stand(parallel_context)
    q_name, k_name, v_name = names
    segments = (
        Segment(size=num_heads * head_dim, unit=head_dim, name=q_name),
        Segment(size=num_kv_heads * head_dim, unit=head_dim, name=k_name, replicate=True),
        Segment(size=num_kv_heads * head_dim, unit=head_dim, name=v_name, replicate=True),
    )
    _check_divides("qkv_parallel", segments, rank, size)
    adapter = _adapter(linear, parallel_context)
    create = getattr(adapter, "create_qkv_parallel", None)
    layout = WeightLayout(
        shape=(sum(s.size for s in segments), hidden_size), dim=0, segments=segments
    )
    if create is not None:
        layer = create(
            hidden_size, num_heads, num_kv_heads, head_dim, parallel_context, bias=bias, **options
        )
    else:
        local = layout.local_shape(rank, size)[0]
        layer = adapter.create_column_parallel(
            hidden_size, local * size, parallel_context, bias=bias, **options
        )
        if layout.has_replicas(size):
            _sum_replica_gradients(layer, layout, parallel_context)
    return _finish(layer, adapter, hidden_size, layout.shape[0], segments, bias, rank, size)


def vocab_embedding(
    num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext, *, linear: Any = None
) -> nn.Module:
    """A token embedding whose rows are sharded over the tensor axis (padded where they do not divide).

    Returns:
        A module: token ids `[...]` to `[..., embedding_dim]`, whole on every rank (under sequence parallel: sharded
        along the sequence).
    """
    adapter = _with_method(_adapter(linear, parallel_context), "create_vocab_embedding")
    rank, size = _stand(parallel_context)
    layer = adapter.create_vocab_embedding(num_embeddings, embedding_dim, parallel_context)
    layout = vocab_layout((num_embeddings, embedding_dim), adapter)
    attach_layouts(layer, {"weight": layout}, rank, size)
    return layer


def lm_head(
    hidden_size: int,
    vocab_size: int,
    parallel_context: ParallelContext,
    *,
    bias: bool = False,
    tied_to: nn.Module | None = None,
    linear: Any = None,
) -> nn.Module:
    """The output projection onto the vocabulary, sharded over the tensor axis.

    Args:
        hidden_size: size of the hidden states.
        vocab_size: logical vocabulary size.
        parallel_context: where this process stands.
        bias: add a bias.
        tied_to: the embedding, of the same adapter, whose weight this head shares.
        linear: another library's layer for this one.

    Returns:
        A module `[..., hidden_size] -> [..., local vocabulary]`; columns that only pad the vocabulary are -inf.
        Feed it to `vocab_parallel_cross_entropy`, or to `gather_logits` for the full logits.
    """
    adapter = _with_method(_adapter(linear, parallel_context), "create_lm_head")
    rank, size = _stand(parallel_context)
    layer = adapter.create_lm_head(
        hidden_size, vocab_size, parallel_context, bias=bias, tied_to=tied_to
    )
    layouts = {"weight": vocab_layout((vocab_size, hidden_size), adapter)}
    if bias:
        layouts["bias"] = vocab_layout((vocab_size,), adapter)
    attach_layouts(layer, layouts, rank, size)
    return layer


def rms_norm(
    hidden_size: int,
    parallel_context: ParallelContext,
    *,
    eps: float = 1e-6,
    partial_gradient: bool | None = None,
    linear: Any = None,
) -> nn.Module:
    """Root mean square norm over the last dimension, its weight held whole by every rank.

    Args:
        hidden_size: size of the last dimension.
        parallel_context: where this process stands.
        eps: added to the mean square.
        partial_gradient: whether each tensor-parallel rank normalises only part of the activations, so that the
            weight's gradients have to be summed. Default: whether the layout is sequence parallel. True for a norm
            over the heads of one rank (QK norm).
        linear: another library's norm.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """
    if partial_gradient is None:
        partial_gradient = parallel_context.layout.sequence_parallel
    adapter = _with_method(_adapter(linear, parallel_context), "create_norm")
    return adapter.create_norm(
        hidden_size, parallel_context, eps=eps, partial_gradient=partial_gradient
    )


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    linear: Any = None,
) -> torch.Tensor:
    """Cross-entropy of logits that are sharded over the vocabulary; the contract of `torch.nn.functional.cross_entropy`.

    Args:
        logits: `[..., local vocabulary]`, any float dtype, left untouched; computed in float32 or wider.
        targets: `[...]` token ids; `ignore_index` is left out of loss, gradient and mean.
        parallel_context: where this process stands.
        vocab_size: logical size, where the vocabulary is padded; default the local size times the tensor size.
        ignore_index: as in torch.
        reduction: `"mean"`, `"sum"` or `"none"`.
        label_smoothing: as in torch, over the logical vocabulary.
        linear: another library's loss.

    Returns:
        A scalar, or `[...]` with `"none"`; the same on every tensor-parallel rank. float32 (float64 for float64).

    Raises:
        ValueError: an unknown reduction, or a label smoothing outside [0, 1].
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets {tuple(targets.shape)} must have the shape of logits {tuple(logits.shape)} without the last dimension"
        )
    adapter = _with_method(_adapter(linear, parallel_context), "vocab_parallel_cross_entropy")
    return adapter.vocab_parallel_cross_entropy(
        logits,
        targets,
        parallel_context,
        vocab_size=vocab_size or logits.shape[-1] * parallel_context.get_tensor_parallel_world_size(),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def gather_logits(
    logits: torch.Tensor, parallel_context: ParallelContext, vocab_size: int
) -> torch.Tensor:
    """Full logits `[..., vocab_size]` from a vocabulary-parallel head's, on every rank; no gradient flows back."""
    axis = parallel_context.axis("tensor")
    if axis.size > 1:
        assert axis.collectives is not None
        logits = axis.collectives.all_gather(logits.detach(), logits.dim() - 1)
    return logits[..., :vocab_size]


def vocab_layout(shape: tuple[int, ...], adapter: Any) -> WeightLayout:
    """Rows sharded over the tensor axis, padded as the adapter pads."""
    padding = getattr(adapter, "vocab_padding", 1)
    return WeightLayout(shape=shape, dim=0, segments=(Segment(size=shape[0], pad_multiple=padding),))


def _finish(
    layer: nn.Module,
    adapter: Any,
    input_size: int,
    output_size: int,
    segments: tuple[Segment, ...],
    bias: bool,
    rank: int,
    size: int,
) -> nn.Module:
    _unwrap_tuples(layer, adapter)
    layouts = {"weight": WeightLayout(shape=(output_size, input_size), dim=0, segments=segments)}
    if bias:
        layouts["bias"] = WeightLayout(shape=(output_size,), dim=0, segments=segments)
    attach_layouts(layer, layouts, rank, size)
    return layer


def _stand(parallel_context: ParallelContext) -> tuple[int, int]:
    return (
        parallel_context.get_tensor_parallel_rank(),
        parallel_context.get_tensor_parallel_world_size(),
    )


def _check_divides(function: str, segments: Sequence[Segment], rank: int, size: int) -> None:
    for segment in segments:
        try:
            segment.local_range(rank, size)
        except LayoutError as error:
            raise LayoutError(f"{function}: {error}") from None


def _adapter(linear: Any, parallel_context: ParallelContext) -> Any:
    adapter = linear if linear is not None else parallel_context.linear
    if not isinstance(adapter, LinearAdapter):
        raise AdapterError(
            f"{_name(adapter)} is not a LinearAdapter: it needs a method "
            "create_column_parallel(input_size, output_size, parallel_context, bias=False)"
        )
    return adapter


def _with_method(adapter: Any, method: str) -> Any:
    if hasattr(adapter, method):
        return adapter
    logger.info("%s has no %s: the torch adapter's is used", _name(adapter), method)
    return load_adapter("torch").linear


def _name(adapter: Any) -> str:
    return adapter.__name__ if isinstance(adapter, type) else type(adapter).__name__


def _unwrap_tuples(layer: nn.Module, adapter: Any) -> None:
    """Megatron's layers give `(output, bias)`; a user's adapter may hand them over as they are."""
    if getattr(adapter, "plain_outputs", False):
        return

    def unwrap(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output
        if len(output) > 1 and output[1] is not None:
            raise AdapterError(
                f"{type(module).__name__} returned a bias that it did not add: build it with skip_bias_add=False"
            )
        return output[0]

    layer.register_forward_hook(unwrap)


def _sum_replica_gradients(
    layer: nn.Module, layout: WeightLayout, parallel_context: ParallelContext
) -> None:
    axis = parallel_context.axis("tensor")
    for name, parameter in layer.named_parameters():
        if name.rsplit(".", 1)[-1] in ("weight", "bias"):
            parameter.register_hook(lambda gradient: sum_replicas(gradient, layout, axis))


def sum_replicas(gradient: torch.Tensor, layout: WeightLayout, axis: Any) -> torch.Tensor:
    """A shard's gradient with each replicated segment summed over the ranks that hold it.

    Args:
        gradient: local gradient, sharded along dimension 0 as `layout` says (a weight's or its bias's).
        layout: of the weight.
        axis: the tensor axis.
    """
    result = gradient.clone()
    for index, segment in enumerate(layout.segments):
        if segment.replicas(axis.size) == 1:
            continue
        start, length = layout.local_offset(index, axis.rank, axis.size)
        first = segment.local_range(axis.rank, axis.size)[0]
        full = gradient.new_zeros((segment.size, *gradient.shape[1:]))
        full.narrow(0, first, length).copy_(gradient.narrow(0, start, length))
        full = axis.collectives.all_reduce(full)
        result.narrow(0, start, length).copy_(full.narrow(0, first, length))
    return result
