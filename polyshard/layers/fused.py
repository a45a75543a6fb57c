"""Matmuls that a serving engine fuses with the following operation, for `swiglu` and `add_residual`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class FusedProducts:
    """Attached to a layer as `fused_products` by a serving engine that runs the layer's matmul itself.

    Attributes:
        added_to: `(residual, x) -> residual + layer(x)`, for tensors of the weight's dtype; None if unsupported.
        out_features: size of the layer's output, for `added_to`.
        swiglu: `x -> swiglu(layer(x))`; None if the layer is not a merged gate/up projection.
    """

    added_to: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    out_features: int | None = None
    swiglu: Callable[[torch.Tensor], torch.Tensor] | None = None


def fused_products(layer: nn.Module) -> FusedProducts | None:
    """Return the fused products attached to a layer, or None if the layer has hooks, which need its output.

    Only attributes of the layer itself count, since wrappers (LoRA) forward the attributes of the wrapped layer.
    """
    found = layer.__dict__.get("fused_products")
    return None if layer._forward_hooks or layer._forward_pre_hooks else found
