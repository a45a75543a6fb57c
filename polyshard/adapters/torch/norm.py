"""RMS norm with the correct weight gradient when each rank sees only a part of the activations."""

from __future__ import annotations

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.layers.differentiable import sum_gradient


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension, computed in float32 (float64 for float64).

    The result is rounded to the input's dtype before the weight is applied, as in transformers and vLLM.
    """

    plain_norm = True  # exactly that formula, so a server may compute it from `weight` and `eps` with its own operator

    def __init__(self, hidden_size: int, context: ParallelContext, eps: float, partial_gradient: bool) -> None:
        super().__init__()
        self.eps = eps
        self.axis = context.axis("tensor") if partial_gradient else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=context.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of `[..., hidden]`, in the same shape."""
        weight = self.weight if self.axis is None else sum_gradient(self.weight, self.axis)
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * weight
