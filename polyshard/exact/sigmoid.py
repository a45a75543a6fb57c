"""A sigmoid whose bits for an element do not depend on where the element lies in memory."""

from __future__ import annotations

import torch


def exact_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid of `x`, as the softmax of `x` and 0; differentiable, in the dtype of `x`.

    torch's sigmoid computes the last elements of a tensor, or of a thread's part of it, by scalar code that rounds
    otherwise than the vectorized code. Its softmax computes each row by itself.
    """
    return torch.stack((x, torch.zeros_like(x)), dim=-1).softmax(-1).select(-1, 0)
