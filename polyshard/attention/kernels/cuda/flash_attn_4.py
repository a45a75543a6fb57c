"""FlashAttention 4 (flash_attn.cute), with its backward pass, softcap and learned sinks."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from typing_extensions import override

from polyshard.attention.kernels.cuda.flash_limits import flash_unsupported_reason, varlen_arguments, window_of
from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel
from polyshard.core.attention import AttentionSpec


class FlashAttn4(AttentionKernel):
    """`flash_attn.cute.flash_attn_varlen_func`, called directly: torch's own integration supports older releases only.

    Source: flash-attn-4 4.0.0b36, flash_attn/cute/interface.py.
    """

    name = "flash_attn_4"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        reason = flash_unsupported_reason(spec, device, dtype, (9, 0))
        if reason is not None:
            return reason
        if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
            return "needs FlashAttention 4: pip install flash-attn-4"
        return "has no ALiBi" if spec.alibi_slopes is not None else None

    @override
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        from flash_attn.cute import flash_attn_varlen_func  # pyrefly: ignore  # CUDA only

        arguments = varlen_arguments(call)
        arguments["window_size"] = tuple(None if side < 0 else side for side in window_of(call.spec))
        if call.spec.causal and call.spec.sliding_window is None:
            arguments["window_size"] = (None, None)
        out = flash_attn_varlen_func(q, k, v, learnable_sink=sinks, **arguments)
        return out[0] if isinstance(out, tuple) else out
