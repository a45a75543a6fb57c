"""The sum of a residual and what is added to it."""

from __future__ import annotations

import torch
from torch import nn

from polyshard.layers.fused import fused_products


def add_residual(residual: torch.Tensor | None, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """`residual + layer(x)`, bit for bit, differentiable.

    In an engine on CPU the sum is taken inside the layer's matrix product, before it is written.

    Args:
        residual: `[..., out]`; None: nothing is added.
        x: what the layer is given, `[..., in]`.
        layer: any; a row-parallel layer's ranks are summed first.

    Returns:
        `[..., out]`.
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
