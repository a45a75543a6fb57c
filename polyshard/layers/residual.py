"""Addition of a layer's output to a residual."""

from __future__ import annotations

import torch
from torch import nn

from polyshard.layers.fused import fused_products


def add_residual(residual: torch.Tensor | None, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Compute `residual + layer(x)`; differentiable.

    In a vLLM engine on CPU the addition is part of the layer's matmul, before its result is written, bit for bit.

    Args:
        residual: `[..., out]`, or None to add nothing.
        x: the layer's input, `[..., in]`.
        layer: any layer; a row-parallel layer is summed over its ranks first.

    Returns:
        `[..., out]`.

    Examples:
        >>> layer = torch.nn.Linear(2, 2)
        >>> x = torch.ones(3, 2)
        >>> torch.equal(ps.add_residual(x, x, layer), x + layer(x))
        True
    """
    if residual is None:
        return layer(x)
    fused = fused_products(layer)
    if (
        fused is None
        or fused.added_to is None
        or residual.dtype != x.dtype
        or residual.shape != (*x.shape[:-1], fused.out_features)
    ):
        return residual + layer(x)
    return fused.added_to(residual, x)
