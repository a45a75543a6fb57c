"""torch's flash attention for CPU over packed sequences.

One autograd function calls torch's operator once for each run of neighbouring sequences of equal length, forward and
backward. Measured by benchmarks/attention.py (one thread, AMD Zen 4): padding costs up to 4.5 times as much on mixed
lengths and a block mask up to 23 times; a loop over SDPA is on a par for long sequences, and up to 1.15 times on
many short ones.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from polyshard.core.attention import AttentionSpec, PackedSequences

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _runs(lengths: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first token, number of sequences, length) of each run of equal lengths; empty sequences are left out."""
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        if length:
            runs.append((start, count, length))
        start += count * length
    return runs


def _batch(packed: torch.Tensor, start: int, count: int, length: int) -> torch.Tensor:
    """`[tokens, heads, dim]` to a view `[count, heads, length, dim]` of one run."""
    return packed[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2)


class _PackedFlash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        runs: list[tuple[int, int, int]],
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        logsumexps = []
        for run in runs:
            part, logsumexp = _FORWARD(_batch(q, *run), _batch(k, *run), _batch(v, *run), 0.0, causal, scale=scale)
            _batch(out, *run).copy_(part)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(q, k, v, out, *logsumexps)
        ctx.runs, ctx.causal, ctx.scale = runs, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *logsumexps = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for run, logsumexp in zip(ctx.runs, logsumexps):
            parts = _BACKWARD(
                _batch(gradients[0], *run),
                _batch(q, *run),
                _batch(k, *run),
                _batch(v, *run),
                _batch(out, *run),
                logsumexp,
                0.0,
                ctx.causal,
                scale=ctx.scale,
            )
            for target, part in zip((grad_q, grad_k, grad_v), parts):
                _batch(target, *run).copy_(part)
        return grad_q, grad_k, grad_v, None, None, None


class CpuFlash:
    """torch's `_scaled_dot_product_flash_attention_for_cpu`; grouped-query natively."""

    name = "cpu_flash"

    def rejects(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """See `AttentionKernel`."""
        if device.type != "cpu":
            return f"needs a CPU, not {device.type}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"has no {dtype}"
        if spec.dropout and training:
            return "has no dropout"
        if spec.sliding_window is not None:
            return "has no sliding window"
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
        return _PackedFlash.apply(q, k, v, _runs(sequences.lengths), spec.causal, spec.scale)
