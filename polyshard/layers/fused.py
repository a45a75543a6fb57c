"""What an engine can compute together with a layer's matrix product, for the functions of models that ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class FusedProducts:
    """Set on a layer as `fused_products`, by an engine whose product the layer's forward is.

    Attributes:
        added_to: `(residual, x) -> residual + layer(x)`, of tensors like the layer's weight in dtype; None where the
            engine has no such product.
        out_features: size of the layer's output, for `added_to`.
        swiglu: `x -> swiglu(layer(x))`; None where its outputs are not gates and what they gate.
    """

    added_to: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    out_features: int | None = None
    swiglu: Callable[[torch.Tensor], torch.Tensor] | None = None


def fused_products(layer: nn.Module) -> FusedProducts | None:
    """Those of a layer, unless hooks want to see its output.

    The layer's own, since wrappers (LoRA's) hand on what they wrap.
    """
    found = layer.__dict__.get("fused_products")
    return None if layer._forward_hooks or layer._forward_pre_hooks else found
