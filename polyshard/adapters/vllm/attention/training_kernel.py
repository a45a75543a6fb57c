"""The attention kernel of vLLM's engine with a backward pass: a trainer's forward computes the server's numbers.

vLLM's kernels are forward-only, and autograd through them would silently give no gradient or zeros. This module
computes the backward pass from q, k, v, the output and the logsumexp.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from polyshard.adapters.vllm.compat.paging import CUDA_BLOCK, pad_last_dim, page_keys_values
from polyshard.attention.kernels import attention_operator as operator
from polyshard.attention.kernels.cpu.chunked import add_logsumexp
from polyshard.attention.kernels.cpu.kernels import Chunked
from polyshard.attention.kernels.cpu.tiles import runs
from polyshard.attention.kernels.cuda.flash_limits import flash_unsupported_reason, window_of
from polyshard.attention.kernels.cuda.torch_varlen import TorchVarlen
from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel, BlockKernel
from polyshard.core.attention import AttentionSpec
from polyshard.core.errors import ConfigurationError


class VllmKernel(AttentionKernel, BlockKernel):
    """vLLM's attention: on CPU its paged attention over a cache built for the call, on CUDA its flash-attention.

    Args:
        exact: compute the bits of an engine in exact mode, in any batch (kernel `vllm_exact`).
    """

    native_sinks = True

    def __init__(self, exact: bool = False) -> None:
        self.name = "vllm_exact" if exact else "vllm"
        self._exact = exact

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        if spec.dropout:
            return "has no dropout"
        if device.type == "cuda":
            return flash_unsupported_reason(spec, device, dtype, (8, 0))
        if device.type != "cpu":
            return f"needs CUDA or a CPU, not {device.type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has no {dtype}"
        if not spec.causal and spec.sliding_window is not None:
            return "has no sliding window around the query, only before it"
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
        if q.device.type == "cuda":
            return *_cuda_forward(q, k, v, call, self._exact), q.new_empty(0)
        out, logsumexp = _cpu_forward(q, k, v, call, self._exact)
        if logsumexp is not None:
            return out, logsumexp, q.new_empty(0)
        logsumexp = torch.full(q.shape[:2], -math.inf, dtype=torch.float32, device=q.device)
        if call.logsumexp:
            for run in runs(call):
                add_logsumexp(q, k, run, call, logsumexp)
            if call.sinks is not None:
                logsumexp = torch.logaddexp(logsumexp, call.sinks.float())
        return out, logsumexp, q.new_empty(0)

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
        kernel = TorchVarlen()
        spec = call.spec
        if kernel.unsupported_reason(spec, q.device, q.dtype, True) is not None or call.alibi_slopes is not None:
            kernel = Chunked()
        call = replace(call, save=False)  # this forward saves no attention weights
        return kernel.backward(grad_out, q, k, v, out, logsumexp, saved, call)


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, exact: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output, and the logsumexp if the kernel computes it."""
    from polyshard.adapters.vllm import compat
    from polyshard.adapters.vllm.attention.exact import exact_attention

    needed, value_dim = max(q.shape[2], v.shape[2]), v.shape[2]
    size = compat.cpu_head_size(needed)
    if size is None:
        largest = max(compat.cpu_head_sizes())
        raise ConfigurationError(
            f"the head dimension is unsupported by vLLM's CPU kernel: got {needed}, expected up to {largest}"
        )
    q, k, v = (pad_last_dim(t, size) for t in (q, k, v))
    lengths = call.queries.lengths, call.keys.lengths
    if not q.shape[0] or not k.shape[0]:
        return q.new_zeros((*q.shape[:2], value_dim)), None
    if any(rows > keys for rows, keys in zip(*lengths)):
        raise ConfigurationError(
            "the sequences are unsupported by vLLM's CPU kernel: each needs at least as many keys as queries"
        )
    out, logsumexp = exact_attention(q, k, v, call) if exact else (compat.cpu_attention(q, k, v, call), None)
    return out[..., :value_dim].contiguous(), logsumexp


def _cuda_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from polyshard.adapters.vllm import compat

    spec, value_dim = call.spec, v.shape[2]
    size = max(q.shape[2], value_dim)  # as in the engine's cache; see `PagedAttention`
    q, k, v = (pad_last_dim(t, size) for t in (q, k, v))
    keys: dict[str, Any] = {"cu_seqlens_k": call.keys.cu_seqlens}
    if exact:
        # As in the engine: tiles depend on whether keys are paged, and splits on the batch.
        k, v, table = page_keys_values(k, v, call.keys.host, CUDA_BLOCK)
        keys = {"seqused_k": call.keys.cu_seqlens.diff(), "block_table": table, "num_splits": 1}
    out, logsumexp = compat.cuda_flash_attention()(
        q,
        k,
        v,
        max_seqlen_q=call.queries.max_length,
        cu_seqlens_q=call.queries.cu_seqlens,
        max_seqlen_k=call.keys.max_length,
        **keys,
        softmax_scale=spec.scale,
        causal=spec.causal,
        window_size=list(window_of(spec)),
        softcap=spec.softcap or 0.0,
        alibi_slopes=call.alibi_slopes,
        return_softmax_lse=True,
        fa_version=compat.cuda_flash_version(size, spec, call.sinks is not None),
        s_aux=call.sinks,
    )
    return out[..., :value_dim].contiguous(), logsumexp.transpose(0, 1).contiguous()
