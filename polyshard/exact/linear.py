"""Parallel layers in exact mode: the parameters of any library's layers, multiplied by the server's operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError, ConfigurationError, LayoutError
from polyshard.core.exact_mode import ExactMode, Matmul
from polyshard.core.experts import ExpertBank
from polyshard.core.linear_adapter import adapter_with, name_of
from polyshard.core.weight_sharding import WeightLayout, qkv_segments
from polyshard.exact.experts import make_exact
from polyshard.exact.matmul import exact_matmul
from polyshard.exact.norm import ExactRMSNorm
from polyshard.exact.reduction import sum_in_order
from polyshard.layers.differentiable import (
    copy_to_region,
    gather_sequence,
    require_divisible_sequence,
    sum_gradient,
    transform_gradient,
)
from polyshard.layers.head import PaddedHead
from polyshard.layers.replica_gradients import sum_replicas

OnBuilt = Callable[[nn.Module], None]


class ExactLinear(nn.Module):
    """The parameters of a library's layer, with an exact matmul."""

    def __init__(self, owner: nn.Module, context: ParallelContext, exact: ExactMode) -> None:
        super().__init__()
        weight, bias = owner.weight, getattr(owner, "bias", None)
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self.bias: nn.Parameter | None = bias
        self.axis = context.axis("tensor")
        self.sequence_parallel = context.layout.sequence_parallel and self.axis.size > 1
        self.exact = exact
        self.packed: tuple[Matmul, ...] | None = None  # a server's, once its weights are loaded

    def parts(self) -> list[torch.Tensor]:
        """Return the matrices to be packed, in the order in which the forward pass multiplies by them."""
        return [self.weight]

    def pack(self) -> None:
        """Pack copies of the current weights for all further calls; for servers, which know when weights change."""
        self.packed = tuple(self.exact.operators.pack(part) for part in self.parts())

    def matmul(self, x: torch.Tensor, weight: torch.Tensor, index: int) -> torch.Tensor:
        """Multiply by one of the parts."""
        dtype = self.exact.compute_dtype or weight.dtype
        if x.dtype != dtype:
            raise ConfigurationError(
                f"the input of a layer has the wrong dtype for exact mode: got {x.dtype}, expected {dtype}. Autocast "
                "is not exact: build the model in the server's dtype, or keep float32 parameters with "
                "ps.initialize(..., exact=True, precision=ps.Precision(compute=torch.bfloat16))."
            )
        packed = None if self.packed is None else self.packed[index]
        return exact_matmul(x, weight.to(dtype), self.exact.operators, packed)


class ExactReplicatedLinear(ExactLinear):
    """`y = x Wᵀ + b`, replicated on every rank.

    Args:
        owner: the layer with the parameters.
        context: the parallel context.
        exact: the exact mode.
        dtype: of the matmul, for a router whose logits are float32 in a bfloat16 model; None for the model's.
    """

    def __init__(
        self, owner: nn.Module, context: ParallelContext, exact: ExactMode, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(owner, context, exact)
        self.dtype = dtype

    @override
    def parts(self) -> list[torch.Tensor]:
        return [self._wide(self.weight)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer: `[..., in]` to `[..., out]`."""
        if self.dtype is None:
            y = self.matmul(x, self.weight, 0)
        else:
            packed = None if self.packed is None else self.packed[0]
            y = exact_matmul(x.to(self.dtype), self._wide(self.weight), self.exact.operators, packed)
        return y if self.bias is None else y + self._wide(self.bias).to(y.dtype)

    def _wide(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a parameter in the dtype of the matmul, rounded to the server's dtype before."""
        if self.dtype is None:
            return weight
        return (weight if self.exact.compute_dtype is None else weight.to(self.exact.compute_dtype)).to(self.dtype)


class ExactColumnParallelLinear(ExactLinear):
    """`y = x Wᵀ + b` with the rows of `W` sharded; shapes are those of `polyshard.column_parallel`.

    Every output feature is a sum over all inputs, so a rank's result equals the corresponding columns of the full
    product.
    """

    def __init__(
        self, owner: nn.Module, context: ParallelContext, exact: ExactMode, layout: WeightLayout | None = None
    ) -> None:
        super().__init__(owner, context, exact)
        self.shared = layout if layout is not None and layout.has_replicas(self.axis.size) else None

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = gather_sequence(x, self.axis) if self.sequence_parallel else copy_to_region(x, self.axis)
        weight, bias = self.weight, self.bias
        if self.shared is not None and torch.is_grad_enabled():
            add_up = partial(sum_replicas, layout=self.shared, axis=self.axis)
            weight = transform_gradient(weight, add_up)
            bias = None if bias is None else transform_gradient(bias, add_up)
        y = self.matmul(x, weight, 0)
        return y if bias is None else y + bias.to(y.dtype)


class ExactRowParallelLinear(ExactLinear):
    """`y = x Wᵀ + b` with the columns of `W` sharded; shapes are those of `polyshard.row_parallel`.

    The input features are divided into `exact.shards` shards, whose partial products are added in order.
    """

    def __init__(self, owner: nn.Module, context: ParallelContext, exact: ExactMode) -> None:
        super().__init__(owner, context, exact)
        self.count = exact.shards // self.axis.size
        if self.weight.shape[1] % self.count:
            raise LayoutError(
                f"exact_shards={exact.shards} does not divide the {self.weight.shape[1] * self.axis.size} input "
                "features of a row-parallel layer"
            )

    def parts(self) -> list[torch.Tensor]:
        """Return one matrix for each shard of input features on this rank."""
        return list(self.weight.chunk(self.count, dim=1))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel:
            require_divisible_sequence(x, self.axis, x.dim() - 2)
        inputs = x.chunk(self.count, dim=-1)
        partial_sums = [self.matmul(one, part, i) for i, (one, part) in enumerate(zip(inputs, self.parts()))]
        y = sum_in_order(partial_sums, self.axis, self.sequence_parallel)
        if self.bias is None:
            return y
        bias = sum_gradient(self.bias, self.axis) if self.sequence_parallel else self.bias
        return y + bias.to(y.dtype)


class ExactLinearAdapter:
    """A `LinearAdapter` that wraps another one, which creates the parameters, and multiplies them exactly.

    Args:
        inner: the wrapped adapter; its layers must compute `x Wᵀ + b` and nothing else (`plain_products`).
        exact: the exact mode.
        on_built: called with every layer; a server packs the layer after its weights are loaded.

    Examples:
        >>> context = ps.exact_context(ps.initialize("torch"))
        >>> ps.column_parallel(16, 32, context)(torch.ones(3, 16)).shape
        torch.Size([3, 32])
    """

    plain_outputs = True
    plain_products = False

    def __init__(self, inner: Any, exact: ExactMode, on_built: OnBuilt = lambda layer: None) -> None:
        if not getattr(inner, "plain_products", False):
            raise AdapterError(
                f"exact mode replaces the matmul of layers, but {name_of(inner)} does not declare that its layers "
                "compute x Wᵀ + b and nothing else. Set plain_products = True on it if they do."
            )
        self.inner, self._exact, self._on_built = inner, exact, on_built

    @property
    def vocab_padding(self) -> int:
        """Padding of the inner adapter."""
        return getattr(self.inner, "vocab_padding", 1)

    @property
    def smooths_labels(self) -> bool:
        """Whether the inner adapter's loss smooths labels."""
        return getattr(self.inner, "smooths_labels", True)

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Create a column-parallel layer for one or more projections."""
        return self._column(
            self.inner.create_column_parallel(input_size, output_size, parallel_context, bias=bias), parallel_context
        )

    def create_merged_column_parallel(
        self, input_size: int, output_sizes: list[int], parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Create a layer for several projections that are sharded separately, if the inner adapter has one."""
        create = getattr(self.inner, "create_merged_column_parallel", None)
        if create is None:
            return self.create_column_parallel(input_size, sum(output_sizes), parallel_context, bias)
        return self._column(create(input_size, output_sizes, parallel_context, bias=bias), parallel_context)

    def create_qkv_parallel(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        parallel_context: ParallelContext,
        bias: bool = False,
    ) -> nn.Module:
        """Create the fused query, key and value projection; gradients of shared KV heads are summed in autograd."""
        segments = qkv_segments(num_heads, num_kv_heads, head_dim)
        layout = WeightLayout(shape=(sum(s.size for s in segments), hidden_size), dim=0, segments=segments)
        axis = parallel_context.axis("tensor")
        create = getattr(self.inner, "create_qkv_parallel", None)
        if create is not None:
            layer = create(hidden_size, num_heads, num_kv_heads, head_dim, parallel_context, bias=bias)
        else:
            rows = layout.local_shape(axis.rank, axis.size)[0] * axis.size
            layer = self.inner.create_column_parallel(hidden_size, rows, parallel_context, bias=bias)
        return self._column(layer, parallel_context, layout)

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Create a row-parallel layer."""
        create = getattr(self.inner, "create_row_parallel", None)
        if create is None:
            raise AdapterError(f"{name_of(self.inner)} has no row-parallel layers")
        layer = create(input_size, output_size, parallel_context, bias=bias)
        return self._built(ExactRowParallelLinear(_owner(layer), parallel_context, self._exact))

    def create_experts(self, bank: ExpertBank, parallel_context: ParallelContext) -> nn.Module:
        """Create the experts of a mixture of experts."""
        experts = adapter_with(self.inner, "create_experts").create_experts(bank, parallel_context)
        make_exact(experts, bank, parallel_context, self._exact)
        return self._built(experts)

    def create_vocab_embedding(
        self, num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext
    ) -> nn.Module:
        """Create the inner adapter's embedding, which is exact: it copies a row, and other ranks add zeros."""
        adapter = adapter_with(self.inner, "create_vocab_embedding")
        layer = adapter.create_vocab_embedding(num_embeddings, embedding_dim, parallel_context)
        dtype = self._exact.compute_dtype
        if dtype is not None:
            layer.register_forward_hook(lambda module, args, output: output.to(dtype))
        return layer

    def create_lm_head(
        self,
        hidden_size: int,
        vocab_size: int,
        parallel_context: ParallelContext,
        bias: bool = False,
        tied_to: nn.Module | None = None,
    ) -> nn.Module:
        """Create the output projection; padding columns of the vocabulary are -inf."""
        adapter = adapter_with(self.inner, "create_lm_head")
        layer = adapter.create_lm_head(hidden_size, vocab_size, parallel_context, bias=bias, tied_to=tied_to)
        return PaddedHead(self._column(layer, parallel_context), vocab_size, parallel_context.axis("tensor"))

    def create_norm(
        self, hidden_size: int, parallel_context: ParallelContext, eps: float, partial_gradient: bool
    ) -> nn.Module:
        """Create an RMS norm with the server's operator."""
        return ExactRMSNorm(hidden_size, parallel_context, eps, partial_gradient, self._exact)

    def vocab_parallel_cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, parallel_context: ParallelContext, **options: Any
    ) -> torch.Tensor:
        """Compute the inner adapter's loss; it need not be exact, since servers compute none."""
        adapter = adapter_with(self.inner, "vocab_parallel_cross_entropy")
        return adapter.vocab_parallel_cross_entropy(logits, targets, parallel_context, **options)

    def _column(self, layer: nn.Module, context: ParallelContext, layout: WeightLayout | None = None) -> nn.Module:
        return self._built(ExactColumnParallelLinear(_owner(layer), context, self._exact, layout))

    def _built(self, layer: nn.Module) -> nn.Module:
        self._on_built(layer)
        return layer


def _owner(layer: nn.Module) -> nn.Module:
    """Return the module inside a library's layer that holds the weight."""
    owners = [module for module in layer.modules() if isinstance(module._parameters.get("weight"), nn.Parameter)]
    if len(owners) != 1:
        raise AdapterError(
            f"{type(layer).__name__} is unsupported in exact mode: got {len(owners)} weights, expected one"
        )
    return owners[0]
