"""torch's flash attention of packed sequences on CUDA: the FlashAttention 2 in torch, or the one activated in torch.

The operators are called directly, since the backward pass of `torch.nn.attention.varlen` ignores the gradient of the
logsumexp, which sinks and ring attention need. Source: torch 2.13, nn/attention/varlen.py.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from polyshard.attention.kernels import attention_operator as operator
from polyshard.attention.kernels.cuda.flash_limits import flash_unsupported_reason, window_of
from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel, BlockKernel
from polyshard.core.attention import AttentionSpec


class TorchVarlen(AttentionKernel, BlockKernel):
    """`aten._flash_attention_forward` and `_backward`."""

    name = "torch_varlen"
    native_sinks = False

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        reason = flash_unsupported_reason(spec, device, dtype, (8, 0))
        if reason is not None:
            return reason
        if spec.softcap is not None:
            return "has no softcap"
        if spec.alibi_slopes is not None:
            return "has no backward for ALiBi"
        if spec.v_dim != spec.head_dim:
            return f"needs value_dim equal to head_dim, not {spec.v_dim} and {spec.head_dim}"
        return None

    @override
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        return operator.attend(self, q, k, v, call, sinks)

    @override
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (t.contiguous() for t in (q, k, v))
        out, logsumexp, state, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_bounds(call), 0.0, call.spec.causal, False, **_options(call)
        )
        # Random state and offset are unused without dropout; the backward pass accepts any tensors of their shapes.
        del state, offset
        return out, logsumexp.transpose(0, 1).contiguous(), q.new_empty(0)

    @override
    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        saved: torch.Tensor,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_out, q, k, v = (t.contiguous() for t in (grad_out, q, k, v))
        total = logsumexp.transpose(0, 1).contiguous()
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        offset = torch.zeros((), dtype=torch.uint64, device=q.device)
        rest = (*_bounds(call), 0.0, call.spec.causal, state, offset)
        return torch.ops.aten._flash_attention_backward(grad_out, q, k, v, out, total, *rest, **_options(call))


def _bounds(call: AttentionCall) -> tuple[Any, ...]:
    queries, keys = call.queries, call.keys
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_length, keys.max_length


def _options(call: AttentionCall) -> dict[str, Any]:
    left, right = window_of(call.spec)
    return {"scale": call.spec.scale, "window_size_left": left, "window_size_right": right}
