"""Rotary embedding with the server's operator in forward; the backward rotates in the opposite direction."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.attention.rotary import rotate_heads
from polyshard.core.exact_mode import ExactOperators


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, operators: ExactOperators
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return operators.rotate(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        to_q, to_k = rotate_heads(gradients[0], gradients[1], cos, -sin)
        return to_q, to_k, None, None, None


def exact_rotate(
    operators: ExactOperators, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys like `polyshard.attention.rotary.rotate_heads`, but with the server's operator."""
    return _Rotate.apply(q, k, cos, sin, operators)
