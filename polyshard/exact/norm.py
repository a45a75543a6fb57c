"""RMS norm with the server's operator in forward and an explicit backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.exact_mode import ExactMode, ExactOperators
from polyshard.layers.differentiable import sum_gradient


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, operators: ExactOperators) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return operators.rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide, gradient = x.float(), gradients[0].float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        normed = wide * scale
        to_normed = gradient * weight.float()
        to_x = scale * (to_normed - normed * (to_normed * normed).mean(-1, keepdim=True))
        to_weight = (gradient * normed).flatten(0, -2).sum(0)
        return to_x.to(x.dtype), to_weight.to(weight.dtype), None, None


class ExactRMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension."""

    def __init__(
        self, hidden_size: int, context: ParallelContext, eps: float, partial_gradient: bool, exact: ExactMode
    ) -> None:
        super().__init__()
        self.eps, self.exact = eps, exact
        self.axis = context.axis("tensor") if partial_gradient else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=context.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the norm: `[..., hidden]` to the same shape."""
        weight = self.weight.to(x.dtype)
        if not torch.is_grad_enabled():
            return self.exact.operators.rms_norm(x, weight, self.eps)
        if self.axis is not None:
            weight = sum_gradient(weight, self.axis)
        return _RMSNorm.apply(x, weight, self.eps, self.exact.operators)
