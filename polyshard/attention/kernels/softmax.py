"""Arithmetic on the softmax's sum that all kernels share."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and logsumexps for tensors of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_sinks(out: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `sinks [heads]` to the softmax's sum: return the new `out [tokens, heads, value_dim]` and logsumexp."""
    total = torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype))
    return (out * (logsumexp - total).exp().unsqueeze(-1)).to(out.dtype), total


def sinks_gradient(
    grad_out: torch.Tensor, out: torch.Tensor, logsumexp: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of `sinks [heads]`, given the output and the logsumexp that include the sinks."""
    row = (grad_out.to(logsumexp.dtype) * out).sum(-1)  # [tokens, heads]
    weight = (sinks.to(logsumexp.dtype) - logsumexp).exp()
    return -(weight * row).sum(0).to(sinks.dtype)
