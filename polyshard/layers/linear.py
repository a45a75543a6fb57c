"""Column-parallel, row-parallel and fused query/key/value layers, as functions of a parallel context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError, LayoutError
from polyshard.core.linear_adapter import choose_adapter, name_of, tensor_rank_and_size, unwrap_tuples
from polyshard.core.weight_sharding import Segment, WeightLayout, qkv_segments, replicated
from polyshard.core.weight_table import attach_layouts
from polyshard.layers.replica_gradients import sum_replicas


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
    """Create a linear layer whose output features are sharded over the tensor axis.

    Args:
        input_size: size of the input's last dimension. The input is replicated; under sequence parallel it is sharded
            along the sequence and gathered by the layer.
        output_size: number of output features, or one number for each of several fused projections, such as `[f, f]`,
            which are sharded separately.
        parallel_context: the parallel context.
        bias: add a bias, sharded like the output.
        names: checkpoint names of the fused projections (`["gate_proj", "up_proj"]`); without names, the fused tensor
            is stored as one.
        linear: the linear adapter of another library for this layer; `parallel_context.linear` by default.
        options: further arguments of the adapter.

    Returns:
        A module `[..., input_size] -> [..., sum(output sizes) / tensor size]`. With several sizes, the output
        concatenates the local part of each.

    Raises:
        LayoutError: a size is not divisible by the tensor-parallel size.

    Examples:
        >>> context = ps.initialize("torch")
        >>> layer = ps.column_parallel(16, [32, 32], context, names=["gate_proj", "up_proj"])
        >>> layer(torch.ones(5, 16)).shape
        torch.Size([5, 64])
    """
    sizes = (output_size,) if isinstance(output_size, int) else tuple(output_size)
    if names is not None and len(names) != len(sizes):
        raise LayoutError(f"names is invalid: got {list(names)}, expected {len(sizes)} names, one for each output size")
    segments = tuple(
        Segment(size=size, name=name) for size, name in zip(sizes, names or [None] * len(sizes), strict=True)
    )
    rank, size = tensor_rank_and_size(parallel_context)
    _check_divides("column_parallel", segments, rank, size)
    adapter = choose_adapter(linear, parallel_context)
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
    """Create a linear layer whose input features are sharded: the counterpart of `column_parallel`.

    Returns:
        A module `[..., input_size / tensor size] -> [..., output_size]`. The output is summed over the tensor axis and,
        under sequence parallel, scattered along the sequence. The bias is added once.

    Raises:
        LayoutError: `input_size` is not divisible by the tensor-parallel size.
        AdapterError: the adapter has no row-parallel layers.

    Examples:
        >>> context = ps.initialize("torch")
        >>> ps.row_parallel(32, 16, context)(torch.ones(5, 32)).shape
        torch.Size([5, 16])
    """
    segments = (Segment(size=input_size),)
    rank, size = tensor_rank_and_size(parallel_context)
    _check_divides("row_parallel", segments, rank, size)
    adapter = choose_adapter(linear, parallel_context)
    create = getattr(adapter, "create_row_parallel", None)
    if create is None:
        raise AdapterError(
            f"{name_of(adapter)} has no row-parallel layers. Add a method "
            "create_row_parallel(input_size, output_size, parallel_context, bias=False)."
        )
    layer = create(input_size, output_size, parallel_context, bias=bias, **options)
    unwrap_tuples(layer, adapter)
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
    value_dim: int | None = None,
    names: Sequence[str] | None = ("q_proj", "k_proj", "v_proj"),
    linear: Any = None,
    **options: Any,
) -> nn.Module:
    """Create a fused query, key and value projection that is sharded by heads.

    If the tensor axis has more ranks than there are KV heads, each KV head is replicated on several ranks and its
    gradient is summed over them. Value heads have size `value_dim`, `head_dim` by default. The three projections have
    the checkpoint names `names`; with None they are stored as one tensor under the layer's own name.

    Returns:
        A module `[..., hidden_size] -> [..., (q + kv) head_dim + kv value_dim]`, with this rank's
        `q = num_heads / tensor size` and `kv = max(1, num_kv_heads / tensor size)`.

    Raises:
        LayoutError: the heads cannot be divided.

    Examples:
        >>> context = ps.initialize("torch")
        >>> ps.qkv_parallel(32, 4, 2, 8, context)(torch.ones(5, 32)).shape
        torch.Size([5, 64])
    """
    if num_heads % num_kv_heads:
        raise LayoutError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    rank, size = tensor_rank_and_size(parallel_context)
    value_dim = head_dim if value_dim is None else value_dim
    segments = qkv_segments(num_heads, num_kv_heads, head_dim, value_dim, names or (None, None, None))
    _check_divides("qkv_parallel", segments, rank, size)
    adapter = choose_adapter(linear, parallel_context)
    create = getattr(adapter, "create_qkv_parallel", None)
    layout = WeightLayout(shape=(sum(s.size for s in segments), hidden_size), dim=0, segments=segments)
    if create is not None and value_dim == head_dim:
        layer = create(hidden_size, num_heads, num_kv_heads, head_dim, parallel_context, bias=bias, **options)
    else:
        local = layout.local_shape(rank, size)[0]
        layer = adapter.create_column_parallel(hidden_size, local * size, parallel_context, bias=bias, **options)
        if layout.has_replicas(size):
            _sum_replica_gradients(layer, layout, parallel_context)
    return _finish(layer, adapter, hidden_size, layout.shape[0], segments, bias, rank, size)


def replicated_linear(
    input_size: int, output_size: int, parallel_context: ParallelContext, *, bias: bool = False
) -> nn.Module:
    """Create a linear layer that is replicated on every rank (a bottleneck, a router); exact in exact mode.

    All tensor-parallel ranks must pass the same input and use the output in the same way; otherwise the caller must sum
    the gradients.

    Returns:
        A module `[..., input_size] -> [..., output_size]`.

    Examples:
        >>> context = ps.initialize("torch")
        >>> ps.replicated_linear(8, 4, context)(torch.ones(2, 8)).shape
        torch.Size([2, 4])
    """
    layer = nn.Linear(input_size, output_size, bias=bias, device=parallel_context.device)
    exact = parallel_context.exact
    return layer if exact is None else exact.replicated_linear(layer, parallel_context)


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
    unwrap_tuples(layer, adapter)
    layouts = {"weight": WeightLayout(shape=(output_size, input_size), dim=0, segments=segments)}
    if bias:
        layouts["bias"] = WeightLayout(shape=(output_size,), dim=0, segments=segments)
    attach_layouts(layer, layouts, rank, size)
    return layer


def _check_divides(function: str, segments: Sequence[Segment], rank: int, size: int) -> None:
    for segment in segments:
        try:
            segment.local_range(rank, size)
        except LayoutError as error:
            raise LayoutError(f"{function}: {error}") from None


def _sum_replica_gradients(layer: nn.Module, layout: WeightLayout, parallel_context: ParallelContext) -> None:
    axis = parallel_context.axis("tensor")
    for name, parameter in layer.named_parameters():
        if name.rsplit(".", 1)[-1] in ("weight", "bias"):
            parameter.register_hook(lambda gradient: sum_replicas(gradient, layout, axis))
