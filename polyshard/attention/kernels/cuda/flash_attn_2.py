"""FlashAttention 2 (package flash-attn), with its backward pass."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from typing_extensions import override

from polyshard.attention.kernels.cuda.flash_limits import flash_unsupported_reason, varlen_arguments
from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel
from polyshard.core.attention import AttentionSpec


class FlashAttn2(AttentionKernel):
    """`flash_attn.flash_attn_varlen_func`. Source: flash_attn 2.8.3, flash_attn_interface.py."""

    name = "flash_attn_2"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        reason = flash_unsupported_reason(spec, device, dtype, (8, 0))
        if reason is not None:
            return reason
        if find_spec("flash_attn") is None or find_spec("flash_attn.flash_attn_interface") is None:
            return "needs flash-attn 2: pip install flash-attn"
        if spec.v_dim != spec.head_dim:
            return f"needs value_dim equal to head_dim, not {spec.v_dim} and {spec.head_dim}"
        return "has no gradient of sinks" if spec.sinks else None

    @override
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        assert sinks is None
        from flash_attn import flash_attn_varlen_func  # pyrefly: ignore  # CUDA only

        return flash_attn_varlen_func(q, k, v, alibi_slopes=call.alibi_slopes, **varlen_arguments(call))
