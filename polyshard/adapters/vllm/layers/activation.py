"""The activation of an engine on a GPU: vLLM's operator, where a model names the layer before it."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.adapters.vllm.compat import silu_and_mul
from polyshard.layers.activation import swiglu
from polyshard.layers.fused import FusedProducts


def activate_by_operator(layer: Any) -> None:
    """Have `polyshard.swiglu(x, layer)` taken by vLLM's operator; torch.compile fuses torch's operations by itself.

    Args:
        layer: of gates and what they gate.
    """

    def activated(x: torch.Tensor) -> torch.Tensor:
        gate_up = layer(x)
        return swiglu(gate_up) if torch.compiler.is_compiling() else silu_and_mul(gate_up)

    layer.fused_products = FusedProducts(swiglu=activated)
