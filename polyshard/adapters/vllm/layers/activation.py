"""SwiGLU of an engine on a GPU with vLLM's operator, for models that pass the gate/up layer to `polyshard.swiglu`."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.adapters.vllm.compat import silu_and_mul
from polyshard.layers.activation import swiglu
from polyshard.layers.fused import FusedProducts


def use_swiglu_operator(layer: Any) -> None:
    """Make `polyshard.swiglu(x, layer)` use vLLM's operator, unless torch.compile fuses torch's operations.

    Args:
        layer: a merged gate/up projection.
    """

    def activated(x: torch.Tensor) -> torch.Tensor:
        gate_up = layer(x)
        return swiglu(gate_up) if torch.compiler.is_compiling() else silu_and_mul(gate_up)

    layer.fused_products = FusedProducts(swiglu=activated)
