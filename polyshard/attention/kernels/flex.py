"""torch's FlexAttention: compiled masks and score modifications, for features that flash kernels lack.

On CPU torch 2.13 implements only the forward pass ("backward not supported": nn/attention/flex_attention.py), so that
the kernel rejects training there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from typing_extensions import override

from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel
from polyshard.core.attention import AttentionSpec

Index = torch.Tensor


class Flex(AttentionKernel):
    """`torch.nn.attention.flex_attention`."""

    name = "flex"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        if device.type not in ("cuda", "cpu"):
            return f"needs CUDA or a CPU, not {device.type}"
        if device.type == "cpu" and training:
            return "has no backward on CPU"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has no {dtype}"
        if spec.dropout:
            return "has no dropout"
        if spec.head_dim & (spec.head_dim - 1) or spec.v_dim & (spec.v_dim - 1):
            return f"needs head dimensions that are powers of two, not {spec.head_dim} and {spec.v_dim}"
        return None

    @override
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        if q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            # torch would raise NotImplementedError from inside the operator.
            raise NotImplementedError(
                "Attention kernel 'flex' has no backward on CPU. Call it under torch.no_grad, or select another kernel."
            )
        if not q.numel() or not k.numel():
            return q.new_zeros((*q.shape[:2], v.shape[-1]))
        from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

        place = _places(call, q.shape[0], k.shape[0], q.device)
        mask = create_block_mask(_mask(call.spec, place), None, None, q.shape[0], k.shape[0], device=q.device)
        out, extra = _attend(q.device.type)(
            *(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)),
            score_mod=_score(call, place),
            block_mask=mask,
            scale=call.spec.scale,
            enable_gqa=call.spec.num_heads != call.spec.num_kv_heads,
            return_aux=AuxRequest(lse=True),
        )
        out = out[0].transpose(0, 1)
        if sinks is None:
            return out
        total = extra.lse[0].transpose(0, 1)
        return (out * torch.sigmoid(total - sinks).unsqueeze(-1)).to(q.dtype)


class _Places:
    """Sequence and position of every query and key token."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.query_sequence, self.query_position, self.key_sequence, self.key_position = tensors


def _places(call: AttentionCall, queries: int, keys: int, device: torch.device) -> _Places:
    parts: list[torch.Tensor] = []
    shift = (call.keys.cu_seqlens.diff() - call.queries.cu_seqlens.diff()).to(device)
    for bounds, tokens, moved in ((call.queries, queries, shift), (call.keys, keys, torch.zeros_like(shift))):
        starts = bounds.cu_seqlens.to(device)
        index = torch.arange(tokens, device=device, dtype=starts.dtype)
        sequence = torch.searchsorted(starts, index, right=True) - 1
        parts += [sequence, index - starts[sequence] + moved[sequence]]
    return _Places(*parts)


def _mask(spec: AttentionSpec, place: _Places) -> Callable[..., torch.Tensor]:
    def seen(batch: Index, head: Index, query: Index, key: Index) -> torch.Tensor:
        apart = place.query_position[query] - place.key_position[key]
        visible = place.query_sequence[query] == place.key_sequence[key]
        if spec.causal:
            visible = visible & (apart >= 0)
        if spec.sliding_window is not None:
            visible = visible & (apart.abs() < spec.sliding_window)
        return visible

    return seen


def _score(call: AttentionCall, place: _Places) -> Callable[..., torch.Tensor] | None:
    softcap, slopes = call.spec.softcap, call.alibi_slopes
    if softcap is None and slopes is None:
        return None

    def changed(score: torch.Tensor, batch: Index, head: Index, query: Index, key: Index) -> torch.Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[head] * (place.query_position[query] - place.key_position[key]).abs()
        return score

    return changed


@cache
def _attend(device: str) -> Any:
    """Return flex_attention, compiled on CUDA: uncompiled it would store the full score matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention
