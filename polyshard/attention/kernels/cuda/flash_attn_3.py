"""FlashAttention 3 for Hopper (the `hopper` folder of flash-attention), with its backward pass."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from typing_extensions import override

from polyshard.attention.kernels.cuda.flash_limits import flash_unsupported_reason, varlen_arguments
from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel
from polyshard.core.attention import AttentionSpec


class FlashAttn3(AttentionKernel):
    """`flash_attn_interface.flash_attn_varlen_func`. Source: flash-attention, hopper/flash_attn_interface.py."""

    name = "flash_attn_3"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        reason = flash_unsupported_reason(spec, device, dtype, (9, 0))
        if reason is not None:
            return reason
        if find_spec("flash_attn_interface") is None:
            return "needs FlashAttention 3: build the hopper folder of flash-attention"
        if torch.cuda.get_device_capability(device)[0] != 9:
            return "needs a Hopper GPU (compute capability 9.0)"
        if spec.alibi_slopes is not None:
            return "has no ALiBi"
        return "has no gradient of sinks" if spec.sinks else None

    @override
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        assert sinks is None
        from flash_attn_interface import flash_attn_varlen_func  # pyrefly: ignore  # CUDA only

        out = flash_attn_varlen_func(q, k, v, **varlen_arguments(call))
        return out[0] if isinstance(out, tuple) else out
