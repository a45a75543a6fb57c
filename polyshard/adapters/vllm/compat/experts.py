"""vLLM's fused experts on CPU, as a function of packed weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from polyshard.adapters.vllm.compat.operators import allow_amx

FusedExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_MULTIPLE = 32  # of hidden and expert size, in the kernels of 0.32 and 0.33 (csrc/cpu/cpu_fused_moe.cpp)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_experts(dtype: torch.dtype, hidden_size: int) -> str | None:
    """Return why vLLM's CPU kernel cannot compute experts; None if it can."""
    if dtype not in _DTYPES:
        return f"it has no kernel for {dtype}"
    if hidden_size % _MULTIPLE:
        return f"it needs a hidden size that is a multiple of {_MULTIPLE}: got {hidden_size}"
    return None


def pack_experts(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    interleaved: bool,
) -> FusedExperts:
    """Pack copies of the weights, and return `(x [tokens, hidden], weights, experts) -> [tokens, hidden]`.

    Args:
        gate_up: `[experts, 2 * size, hidden]`.
        down: `[experts, hidden, size]`.
        gate_up_bias: `[experts, 2 * size]`, or None.
        down_bias: `[experts, hidden]`, or None.
        interleaved: whether gate and up rows alternate, for the clamped activation of gpt-oss; else SwiGLU.
    """
    from vllm import _custom_ops as operators

    allow_amx()
    size = down.shape[2]
    extra = -size % _MULTIPLE  # experts of zeros beside the real channels: activation(0, 0) is 0
    isa = "amx" if gate_up.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"
    w13 = operators.cpu_prepack_moe_weight(_padded(gate_up, extra, interleaved), isa)
    w2 = operators.cpu_prepack_moe_weight(F.pad(down, (0, extra)).contiguous(), isa)
    b13 = None if gate_up_bias is None else _padded(gate_up_bias.unsqueeze(-1), extra, interleaved).squeeze(-1)
    b2 = None if down_bias is None else down_bias.detach().clone()
    activation = "swigluoai" if interleaved else "silu"

    def fused(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        # The kernel reads weights and ids without their strides.
        arguments = weights.float().contiguous(), experts.to(torch.int32).contiguous()
        operators.cpu_fused_moe(out, x.contiguous(), w13, w2, b13, b2, *arguments, activation, isa)
        return out

    return fused


def _padded(gate_up: torch.Tensor, extra: int, interleaved: bool) -> torch.Tensor:
    if not extra:
        return gate_up.detach().contiguous()
    halves = (gate_up,) if interleaved else gate_up.chunk(2, dim=1)
    return torch.cat([F.pad(half, (0, 0, 0, 2 * extra if interleaved else extra)) for half in halves], dim=1)
