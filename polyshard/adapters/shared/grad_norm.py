"""One rank's contribution to the squared gradient norm of the full model, and clipping."""

from __future__ import annotations

import torch

from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_layout import WeightLayout


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise `ConfigurationError` unless it is a positive number, or None for no clipping."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigurationError(f"max_grad_norm must be positive, or None, got {max_grad_norm}")


def counted_square(gradient: torch.Tensor, layout: WeightLayout, rank: int, size: int) -> torch.Tensor:
    """Return this rank's contribution to a parameter's squared gradient norm, a float32 scalar.

    The sum over the tensor axis counts each logical element once: shards on their rank, replicated parameters on the
    first rank only, and parts that several ranks hold divided by the number of replicas.

    Args:
        gradient: the gradient of this rank's shard, not sharded over the data axis.
        layout: the parameter's weight layout.
        rank: this rank's position on the tensor axis.
        size: the size of the tensor axis.
    """
    if layout.has_replicas(size):
        total = torch.zeros((), device=gradient.device)
        for index, segment in enumerate(layout.segments):
            start, length = layout.local_offset(index, rank, size)
            part = gradient.narrow(layout.dim or 0, start, length)
            total += torch.linalg.vector_norm(part, dtype=torch.float32).square() / segment.replicas(size)
        return total
    if layout.dim is None and rank != 0:
        return torch.zeros((), device=gradient.device)
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Return the factor that scales gradients to a norm of at most `max_norm`, as torch's `clip_grad_norm_` does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
