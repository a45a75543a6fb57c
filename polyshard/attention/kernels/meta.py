"""The kernel of the meta device: it computes shapes, so that a model can be planned without memory."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from polyshard.attention.kernels import attention_operator as operator
from polyshard.attention.kernels.arguments import pack
from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel, BlockKernel
from polyshard.core.attention import AttentionSpec


class Meta(AttentionKernel, BlockKernel):
    """Shapes of attention on the meta device, with what flash-attention saves: the output and the logsumexp."""

    name = "meta"
    native_sinks = False

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        return None if device.type == "meta" else f"computes shapes on the meta device only, not on {device.type}"

    @override
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        return operator.attend(self, q, k, v, call, sinks)

    @override
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        operation: Any = torch.ops.polyshard.attention.default
        return operation(q, k, v, *pack(self.name, call, None, True).flat())

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
        operation: Any = torch.ops.polyshard.attention_backward.default
        flat = pack(self.name, call, None, True).flat()
        return operation(grad_out, q, k, v, out, logsumexp, saved, *flat)[:3]
