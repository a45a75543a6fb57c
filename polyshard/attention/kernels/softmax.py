"""Arithmetic on the softmax's sum that is the same around every kernel."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and logsumexps of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_sinks(out: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`out [tokens, heads, value_dim]` and `logsumexp [tokens, heads]` once `sinks [heads]` take part in the sum."""
    total = torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype))
    return (out * (logsumexp - total).exp().unsqueeze(-1)).to(out.dtype), total


def sinks_gradient(
    grad_out: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """Gradient of `sinks [heads]`, from the output and the logsumexp in which they take part."""
    row = (grad_out.to(logsumexp.dtype) * out).sum(-1)  # [tokens, heads]
    weight = (sinks.to(logsumexp.dtype) - logsumexp).exp()
    return -(weight * row).sum(0).to(sinks.dtype)
