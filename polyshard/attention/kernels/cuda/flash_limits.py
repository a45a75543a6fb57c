"""The limits and arguments that all flash-attention kernels on CUDA share."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec


def flash_unsupported_reason(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, capability: tuple[int, int]
) -> str | None:
    """Return the first limit that a request exceeds, or None if it exceeds none."""
    if device.type != "cuda":
        return f"needs CUDA, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    if max(spec.head_dim, spec.v_dim) > 256 or spec.head_dim % 8 or spec.v_dim % 8:
        sizes = spec.head_dim if spec.v_dim == spec.head_dim else f"{spec.head_dim} and {spec.v_dim}"
        return f"needs head dimensions up to 256 that are multiples of 8, not {sizes}"
    if spec.dropout:
        return "draws the same dropout mask for the heads of every tensor-parallel rank"
    if torch.cuda.get_device_capability(device) < capability:
        return f"needs compute capability {capability[0]}.{capability[1]} or newer"
    return None


def window_of(spec: AttentionSpec) -> tuple[int, int]:
    """Return the number of visible keys to the left and to the right of a query; -1 for all."""
    left = -1 if spec.sliding_window is None else spec.sliding_window - 1
    return left, 0 if spec.causal else left


def varlen_arguments(call: AttentionCall) -> dict[str, Any]:
    """Return the keyword arguments that are common to all versions of flash-attention's `flash_attn_varlen_func`."""
    spec = call.spec
    return {
        "cu_seqlens_q": call.queries.cu_seqlens,
        "cu_seqlens_k": call.keys.cu_seqlens,
        "max_seqlen_q": call.queries.max_length,
        "max_seqlen_k": call.keys.max_length,
        "softmax_scale": spec.scale,
        "causal": spec.causal,
        "window_size": window_of(spec),
        "softcap": spec.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
