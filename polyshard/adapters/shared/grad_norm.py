"""What one rank contributes to the squared norm of the logical model's gradient."""

from __future__ import annotations

import torch

from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_layout import WeightLayout


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """Raise `ConfigurationError` unless it is a positive number, or None for no clipping."""
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigurationError(f"max_grad_norm must be positive, or None, got {max_grad_norm}")


def counted_square(gradient: torch.Tensor, layout: WeightLayout, rank: int, size: int) -> torch.Tensor:
    """Each logical element counts once when these are summed over the tensor axis; float32 scalar.

    Shards count where they are, whole parameters on the first rank alone, and parts that several ranks hold by their
    share.

    Args:
        gradient: this rank's shard, whole over the data axis.
        layout: of the parameter.
        rank: position along the tensor axis.
        size: of the tensor axis.
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
    """What to scale gradients with so that their norm is at most `max_norm`; as torch's clip_grad_norm_."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
