"""RMS norm with the correct weight gradient when each rank sees only a part of the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from polyshard.core.context import ParallelContext
from polyshard.layers.differentiable import sum_gradient
from polyshard.native import norm as native


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension, computed in float32 (float64 for float64).

    On CPU a native kernel computes it and rounds once, the same in training and serving. On other devices and under
    torch.compile, the result is rounded to the input's dtype before the weight is applied, as in transformers.
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
        if not torch.compiler.is_compiling() and x.dtype == weight.dtype and native.supports(x):
            return _NativeNorm.apply(x, weight, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * weight


class _NativeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return native.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = native.rms_norm_backward(x, weight, gradients[0], ctx.eps)
        return to_x, to_weight.to(weight.dtype), None
