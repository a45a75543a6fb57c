"""The activation of a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from polyshard.core.errors import ConfigurationError
from polyshard.core.experts import ClampedSwiglu
from polyshard.layers.fused import fused_products
from polyshard.native import swiglu as native


def swiglu(x: torch.Tensor, layer: nn.Module | None = None) -> torch.Tensor:
    """Compute `silu(gate) * up` (Shazeer 2020, "GLU Variants Improve Transformer"); differentiable.

    On CPU a native kernel computes it in one pass over memory in float32, the same in training and serving. On other
    devices and under torch.compile, torch's operators are used.

    Args:
        x: `[..., 2 size]`, gate half first and up half second, as returned by `column_parallel(h, [f, f], ...)`. With
            `layer`, the input of that layer, `[..., h]`.
        layer: a merged gate/up projection; `swiglu(x, layer)` equals `swiglu(layer(x))`. In a vLLM engine on CPU the
            activation is then computed inside the matmul before its result is written, bit for bit; on a GPU without
            torch.compile, by vLLM's operator.

    Returns:
        `[..., size]`.

    Raises:
        ConfigurationError: the last dimension of the gate/up tensor is odd.

    Examples:
        >>> ps.swiglu(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        tensor([[0.0000, 2.1932]])
    """
    if layer is None:
        return _of(x)
    fused = fused_products(layer)
    return _of(layer(x)) if fused is None or fused.swiglu is None else fused.swiglu(x)


def _of(gate_up: torch.Tensor) -> torch.Tensor:
    if gate_up.shape[-1] % 2:
        raise ConfigurationError(f"swiglu needs an even last dimension: got {gate_up.shape[-1]}")
    if torch.compiler.is_compiling() or not native.supports(gate_up):
        return _plain(gate_up)
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _Swiglu.apply(gate_up)
    return native.swiglu(gate_up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return native.swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        (gate_up,) = ctx.saved_tensors
        return native.swiglu_backward(gate_up, gradients[0])


def _plain(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(
    gate_up: torch.Tensor, activation: ClampedSwiglu, sigmoid: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid
) -> torch.Tensor:
    """Return gpt-oss's activation of `[..., 2 * size]`, gate half first and up half second: `[..., size]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return (up + 1) * (gate * sigmoid(gate * activation.alpha))
