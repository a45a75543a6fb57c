"""Norms, as a function of a context."""

from __future__ import annotations

from typing import Any

from torch import nn

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
    adapter = adapter_with(choose_adapter(linear, parallel_context), "create_norm")
    return adapter.create_norm(hidden_size, parallel_context, eps=eps, partial_gradient=partial_gradient)
