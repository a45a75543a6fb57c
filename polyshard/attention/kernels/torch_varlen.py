"""torch's varlen flash attention on CUDA (FlashAttention 2, built into torch)."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch

from polyshard.core.attention import AttentionSpec, PackedSequences


class TorchVarlen:
    """`torch.nn.attention.varlen.varlen_attn`, with its own backward."""

    name = "torch_varlen"

    def rejects(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """See `AttentionKernel`."""
        if device.type != "cuda":
            return f"needs CUDA, not {device.type}"
        if find_spec("torch.nn.attention.varlen") is None:
            return f"needs torch.nn.attention.varlen, which torch {torch.__version__} lacks"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"needs bfloat16 or float16, not {dtype}"
        if spec.dropout and training:
            return "has no dropout"
        if spec.head_dim > 256 or spec.head_dim % 8:
            return f"needs a head dimension up to 256 that is a multiple of 8, not {spec.head_dim}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs compute capability 8.0 or newer"
        return None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: PackedSequences,
        spec: AttentionSpec,
        training: bool,
    ) -> torch.Tensor:
        """See `AttentionKernel`."""
        from torch.nn.attention.varlen import varlen_attn

        left = -1 if spec.sliding_window is None else spec.sliding_window - 1
        right = 0 if spec.causal else (-1 if spec.sliding_window is None else left)
        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = {}
        if spec.num_heads != spec.num_kv_heads:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:  # torch 2.11 and older
                repeats = spec.num_heads // spec.num_kv_heads
                k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        cu, longest = sequences.cu_seqlens, sequences.max_length
        attend: Any = varlen_attn
        return attend(q, k, v, cu, cu, longest, longest, scale=spec.scale, window_size=(left, right), **options)
