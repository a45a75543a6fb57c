"""Norms, as functions of a parallel context."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyshard.core.computation import describe
from polyshard.core.context import ParallelContext
from polyshard.core.linear_adapter import adapter_with, choose_adapter


def rms_norm(
    hidden_size: int,
    parallel_context: ParallelContext,
    *,
    eps: float = 1e-6,
    partial_gradient: bool | None = None,
    linear: Any = None,
) -> nn.Module:
    """Create a root mean square norm over the last dimension; its weight is replicated on every rank.

    Args:
        hidden_size: size of the last dimension.
        parallel_context: the parallel context.
        eps: added to the mean square.
        partial_gradient: whether each tensor-parallel rank normalizes only a part of the activations, so that the
            weight's gradients must be summed. By default, whether the layout is sequence parallel. Pass True for a norm
            over the heads of one rank (QK norm).
        linear: the linear adapter of another library.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

    Examples:
        >>> norm = ps.rms_norm(2, ps.initialize("torch"))
        >>> norm(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]], grad_fn=...)
    """
    if partial_gradient is None:
        partial_gradient = parallel_context.layout.sequence_parallel
    adapter = adapter_with(choose_adapter(linear, parallel_context), "create_norm")
    norm = adapter.create_norm(hidden_size, parallel_context, eps=eps, partial_gradient=partial_gradient)
    describe(norm, eps=eps)
    return norm
