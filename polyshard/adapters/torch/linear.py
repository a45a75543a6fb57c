"""Tensor-parallel layers of plain torch tensors: local weights and explicit collectives, without DTensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

from polyshard.adapters.shared.weights import new_weight
from polyshard.adapters.torch.cross_entropy import cross_entropy_with_z_loss, vocab_parallel_cross_entropy
from polyshard.adapters.torch.norm import RMSNorm
from polyshard.core.context import ParallelContext
from polyshard.core.experts import ExpertBank
from polyshard.core.weight_sharding import Segment, WeightLayout, qkv_segments
from polyshard.layers.differentiable import (
    copy_to_region,
    gather_sequence,
    reduce_from_region,
    scatter_sum_sequence,
    sum_gradient,
    transform_gradient,
)
from polyshard.layers.replica_gradients import sum_replicas


class ColumnParallelLinear(nn.Module):
    """`y = x Wᵀ + b` with the rows of `W` sharded.

    Input `[..., tokens, in]`, replicated (under sequence parallel `[..., tokens / size, in]`); output
    `[..., tokens, out / size]`.
    """

    product: Callable[..., torch.Tensor] = staticmethod(F.linear)  # an engine may set another one on a layer

    def __init__(
        self,
        input_size: int,
        output_size: int,
        segments: tuple[Segment, ...],
        context: ParallelContext,
        bias: bool,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.axis = context.axis("tensor")
        self.sequence_parallel = context.layout.sequence_parallel
        self.layout = WeightLayout(shape=(output_size, input_size), dim=0, segments=segments)
        self.weight = new_weight(self.layout, context, input_size**-0.5)
        bias_layout = WeightLayout(shape=(output_size,), dim=0, segments=segments)
        self.bias = new_weight(bias_layout, context, None) if bias else None
        self.shared = self.layout.has_replicas(self.axis.size)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = gather_sequence(x, self.axis) if self.sequence_parallel else copy_to_region(x, self.axis)
        weight, bias = self.weight, self.bias
        if self.shared and torch.is_grad_enabled():
            add_up = partial(sum_replicas, layout=self.layout, axis=self.axis)
            weight = transform_gradient(weight, add_up)
            bias = None if bias is None else transform_gradient(bias, add_up)
        return self.product(x, weight, bias)

    def extra_repr(self) -> str:
        """Return the full sizes and this rank's position."""
        return f"in={self.input_size}, out={self.output_size}, tensor_parallel={self.axis.rank}/{self.axis.size}"


class RowParallelLinear(nn.Module):
    """`y = x Wᵀ + b` with the columns of `W` sharded.

    Input `[..., tokens, in / size]`; output `[..., tokens, out]`, replicated (under sequence parallel
    `[..., tokens / size, out]`). The bias is added after the sum.
    """

    product: Callable[..., torch.Tensor] = staticmethod(F.linear)  # an engine may set another one on a layer

    def __init__(self, input_size: int, output_size: int, context: ParallelContext, bias: bool) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.axis = context.axis("tensor")
        self.sequence_parallel = context.layout.sequence_parallel
        layout = WeightLayout(shape=(output_size, input_size), dim=1)
        self.weight = new_weight(layout, context, input_size**-0.5)
        self.bias = new_weight(WeightLayout(shape=(output_size,)), context, None) if bias else None

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x, self.weight)
        if not self.sequence_parallel:
            y = reduce_from_region(y, self.axis)
            return y if self.bias is None else y + self.bias
        y = scatter_sum_sequence(y, self.axis)
        # Each rank adds the bias to its own tokens only.
        return y if self.bias is None else y + sum_gradient(self.bias, self.axis)

    def extra_repr(self) -> str:
        """Return the full sizes and this rank's position."""
        return f"in={self.input_size}, out={self.output_size}, tensor_parallel={self.axis.rank}/{self.axis.size}"


class VocabParallelEmbedding(nn.Module):
    """Token embedding with sharded rows: ids `[..., tokens]` to `[..., tokens (/ size), dim]`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, context: ParallelContext) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.axis = context.axis("tensor")
        self.sequence_parallel = context.layout.sequence_parallel
        segment = Segment(size=num_embeddings, pad_multiple=1)
        layout = WeightLayout(shape=(num_embeddings, embedding_dim), dim=0, segments=(segment,))
        self.start, self.length = segment.local_range(self.axis.rank, self.axis.size)
        self.weight = new_weight(layout, context, 0.02)

    @override
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.axis.size == 1:
            return F.embedding(input_ids, self.weight)
        local_ids = input_ids - self.start
        elsewhere = (local_ids < 0) | (local_ids >= self.length)
        x = F.embedding(local_ids.masked_fill(elsewhere, 0), self.weight)
        x = x.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return scatter_sum_sequence(x, self.axis) if self.sequence_parallel else reduce_from_region(x, self.axis)


class VocabParallelHead(nn.Module):
    """Output projection to this rank's part of the vocabulary; the logits of padding columns are -inf."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        context: ParallelContext,
        bias: bool,
        weight: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.axis = context.axis("tensor")
        self.sequence_parallel = context.layout.sequence_parallel
        segment = Segment(size=vocab_size, pad_multiple=1)
        start, length = segment.local_range(self.axis.rank, self.axis.size)
        self.present = max(0, min(vocab_size - start, length))  # local columns without padding
        self.length = length
        layout = WeightLayout(shape=(vocab_size, hidden_size), dim=0, segments=(segment,))
        self.weight = new_weight(layout, context, 0.02) if weight is None else weight
        bias_layout = WeightLayout(shape=(vocab_size,), dim=0, segments=(segment,))
        self.bias = new_weight(bias_layout, context, None) if bias else None

    @override
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = gather_sequence(hidden, self.axis) if self.sequence_parallel else copy_to_region(hidden, self.axis)
        logits = F.linear(x, self.weight, self.bias)
        if self.present == self.length:
            return logits
        padding = torch.arange(self.length, device=logits.device) >= self.present
        return logits.masked_fill(padding, float("-inf"))


class TorchLinearAdapter:
    """The `LinearAdapter` of torch, with all optional methods."""

    plain_outputs = True
    plain_products = True
    vocab_padding = 1

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return a column-parallel layer."""
        return ColumnParallelLinear(input_size, output_size, (Segment(size=output_size),), parallel_context, bias)

    def create_merged_column_parallel(
        self, input_size: int, output_sizes: list[int], parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return several projections merged into one matmul."""
        segments = tuple(Segment(size=size) for size in output_sizes)
        return ColumnParallelLinear(input_size, sum(output_sizes), segments, parallel_context, bias)

    def create_qkv_parallel(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        parallel_context: ParallelContext,
        bias: bool = False,
    ) -> nn.Module:
        """Return query, key and value projections as one matmul; with more ranks than KV heads, ranks share them."""
        segments = qkv_segments(num_heads, num_kv_heads, head_dim)
        total = sum(segment.size for segment in segments)
        return ColumnParallelLinear(hidden_size, total, segments, parallel_context, bias)

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return a row-parallel layer."""
        return RowParallelLinear(input_size, output_size, parallel_context, bias)

    def create_experts(self, bank: ExpertBank, parallel_context: ParallelContext) -> nn.Module:
        """Return the experts of a mixture of experts."""
        from polyshard.adapters.torch.experts import TorchExperts

        return TorchExperts(bank, parallel_context)

    def create_vocab_embedding(
        self, num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext
    ) -> nn.Module:
        """Return a token embedding with sharded rows."""
        return VocabParallelEmbedding(num_embeddings, embedding_dim, parallel_context)

    def create_lm_head(
        self,
        hidden_size: int,
        vocab_size: int,
        parallel_context: ParallelContext,
        bias: bool = False,
        tied_to: nn.Module | None = None,
    ) -> nn.Module:
        """Return an output projection; `tied_to` is an embedding of this adapter whose weight it shares."""
        weight = None if tied_to is None else tied_to.weight
        assert weight is None or isinstance(weight, nn.Parameter)
        return VocabParallelHead(hidden_size, vocab_size, parallel_context, bias, weight)

    def create_norm(
        self, hidden_size: int, parallel_context: ParallelContext, eps: float, partial_gradient: bool
    ) -> nn.Module:
        """Return an RMS norm."""
        return RMSNorm(hidden_size, parallel_context, eps, partial_gradient)

    def vocab_parallel_cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, parallel_context: ParallelContext, **options: Any
    ) -> torch.Tensor:
        """Return the loss of each token; see `polyshard.vocab_parallel_cross_entropy`."""
        return vocab_parallel_cross_entropy(logits, targets, parallel_context.axis("tensor"), **options)

    def cross_entropy_with_z_loss(
        self, logits: torch.Tensor, targets: torch.Tensor, parallel_context: ParallelContext, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each token, and its part that is `z_loss` times the square of the log-sum-exp."""
        return cross_entropy_with_z_loss(logits, targets, parallel_context.axis("tensor"), **options)
