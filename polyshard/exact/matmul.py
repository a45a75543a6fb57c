"""A matrix product by the server's operator, with torch's backward."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.core.exact_mode import ExactOperators, Matmul


class _Product(torch.autograd.Function):
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


def exact_product(
    x: torch.Tensor, weight: torch.Tensor, operators: ExactOperators, packed: Matmul | None = None
) -> torch.Tensor:
    """`x Wᵀ`, for x `[..., in]` and W `[out, in]`; differentiable.

    The weight is packed anew at each call, since nothing tells that an optimizer has written into it (some write into
    flat buffers, which changes no version); a server hands over what it packed when it loaded.
    """
    flat = x.reshape(-1, x.shape[-1])
    if not torch.is_grad_enabled():
        return (packed or operators.pack(weight))(flat).view(*x.shape[:-1], -1)
    return _Product.apply(flat, weight, operators, packed).view(*x.shape[:-1], -1)
