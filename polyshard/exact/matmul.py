"""A matmul with the server's operator in forward and torch's in backward."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.core.exact_mode import ExactOperators, Matmul


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, operators: ExactOperators, packed: Matmul | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return (packed or operators.pack(weight))(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        to_x = gradient @ weight if ctx.needs_input_grad[0] else None
        to_weight = gradient.t() @ x if ctx.needs_input_grad[1] else None
        return to_x, to_weight, None, None


def exact_matmul(
    x: torch.Tensor, weight: torch.Tensor, operators: ExactOperators, packed: Matmul | None = None
) -> torch.Tensor:
    """Compute `x Wᵀ`, for x `[..., in]` and W `[out, in]`; differentiable.

    The weight is packed in every call, since an optimizer's update cannot be detected (updates of flat buffers do not
    change the version counter). A server passes the weight that it packed after loading.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():
        return (packed or operators.pack(weight))(flat).view(*x.shape[:-1], -1)
    return _Matmul.apply(flat, weight, operators, packed).view(*x.shape[:-1], -1)
