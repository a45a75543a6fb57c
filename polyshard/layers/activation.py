"""The activation of a gated MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.errors import ConfigurationError
from polyshard.layers.fused import fused_products
from polyshard.native import swiglu as loops


def swiglu(x: torch.Tensor, layer: nn.Module | None = None) -> torch.Tensor:
    """`silu(gate) * up` (Shazeer 2020, "GLU Variants Improve Transformer"), differentiable.

    On CPU one pass over memory in float32, the same for trainer and server; elsewhere, and in what torch.compile
    fuses by itself, torch's operations.

    Args:
        x: `[..., 2 size]`, the gates before what they gate, as `column_parallel(h, [f, f], ...)` gives them. With a
            layer, what that is given, `[..., h]`.
        layer: makes gates and what they gate: `swiglu(x, layer)` is `swiglu(layer(x))`. In an engine on CPU the
            activation is then taken inside the matrix product, before it is written, bit for bit; on a GPU, where
            nothing is compiled, by vLLM's operator.

    Returns:
        `[..., size]`.

    Raises:
        ConfigurationError: the last dimension of gates and what they gate is odd.
    """
    if layer is None:
        return _of(x)
    fused = fused_products(layer)
    return _of(layer(x)) if fused is None or fused.swiglu is None else fused.swiglu(x)


def _of(gate_up: torch.Tensor) -> torch.Tensor:
    if gate_up.shape[-1] % 2:
        raise ConfigurationError(f"swiglu halves the last dimension, which is {gate_up.shape[-1]}")
    if torch.compiler.is_compiling() or not loops.supports(gate_up):
        return _plain(gate_up)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _Swiglu.apply(gate_up)
    return loops.swiglu(gate_up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return loops.swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.float().chunk(2, dim=-1)
        gradient = gradients[0].float()
        sigmoid = torch.sigmoid(gate)
        to_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
        return torch.cat((to_gate, gradient * gate * sigmoid), dim=-1).to(gate_up.dtype)


def _plain(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
