"""The kernels that go through the runs of a packed batch: by tiles, by torch's flash operator, by the faster of both.

Measured (benchmarks/attention.py, one thread): tiles are faster in bfloat16 at any length, and in float32 for
sequences up to a thousand tokens; torch's operator is faster on longer ones in float32. Padding and block masks lose.
"""

from __future__ import annotations

import math

import torch

from polyshard.attention.kernels import chunked, cpu_flash, operator
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.attention.kernels.softmax import wide
from polyshard.attention.kernels.tiles import Run, runs
from polyshard.core.attention import AttentionSpec

_LONG = 1024  # keys from which torch's operator is faster in float32


class _ByRun:
    """A `BlockKernel` that goes through the runs of a call."""

    name: str
    native_sinks = False

    def by_flash(self, run: Run, call: AttentionCall) -> bool:
        """Whether torch's operator is to compute this run."""
        raise NotImplementedError

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """See `AttentionKernel`."""
        return operator.attend(self, q, k, v, call, sinks)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `BlockKernel`."""
        out = q.new_zeros((*q.shape[:2], v.shape[-1]))
        logsumexp = torch.full(q.shape[:2], -math.inf, dtype=wide(q.dtype), device=q.device)
        work, kept = self._work(q, call)
        saved = q.new_empty(sum(kept))
        for (run, flash), part in zip(work, saved.split(kept)):
            if flash:
                cpu_flash.forward_run(q, k, v, run, call, out, logsumexp)
            else:
                chunked.forward_run(q, k, v, run, call, out, logsumexp, part)
        return out, logsumexp, saved

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
        """See `BlockKernel`."""
        grads = (q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape))
        work, kept = self._work(q, call)
        for (run, flash), part in zip(work, saved.split(kept)):
            if flash:
                cpu_flash.backward_run(grad_out, q, k, v, out, logsumexp, run, call, grads)
            else:
                chunked.backward_run(grad_out, q, k, v, out, logsumexp, part, run, call, grads)
        return grads

    def _work(self, q: torch.Tensor, call: AttentionCall) -> tuple[list[tuple[Run, bool]], list[int]]:
        """The runs with keys, each with whether torch's operator computes it, and how many weights it keeps."""
        work = [(run, self.by_flash(run, call)) for run in runs(call) if run.keys]
        return work, [0 if flash else chunked.saved_elements(run, call, q) for run, flash in work]


class Chunked(_ByRun):
    """Tiles of matrix products: every feature, on any device."""

    name = "chunked"

    def rejects(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """See `AttentionKernel`."""
        return None if dtype.is_floating_point else f"needs a float dtype, not {dtype}"

    def by_flash(self, run: Run, call: AttentionCall) -> bool:
        """Never."""
        return False


class Cpu(Chunked):
    """Tiles, and torch's operator for the long sequences on which it is faster."""

    name = "cpu"

    def rejects(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """See `AttentionKernel`."""
        if device.type != "cpu":
            return f"needs a CPU, not {device.type}"
        return super().rejects(spec, device, dtype, training)

    def by_flash(self, run: Run, call: AttentionCall) -> bool:
        """Long, and with nothing that the operator lacks."""
        return run.keys >= _LONG and cpu_flash.fits(run, call) and flash_lacks(call.spec) is None


class CpuFlash(_ByRun):
    """torch's `_scaled_dot_product_flash_attention_for_cpu` alone."""

    name = "cpu_flash"

    def rejects(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """See `AttentionKernel`."""
        if device.type != "cpu":
            return f"needs a CPU, not {device.type}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"has no {dtype}"
        return flash_lacks(spec)

    def by_flash(self, run: Run, call: AttentionCall) -> bool:
        """Always, but for alignments that the operator cannot express."""
        return cpu_flash.fits(run, call)


def flash_lacks(spec: AttentionSpec) -> str | None:
    """The first feature of `spec` that torch's CPU operator does not have."""
    features = {
        "has no dropout": bool(spec.dropout),
        "has no sliding window": spec.sliding_window is not None,
        "has no logit soft-cap": spec.softcap is not None,
        "has no ALiBi": spec.alibi_slopes is not None,
        f"needs values as wide as keys, not {spec.v_dim} and {spec.head_dim}": spec.v_dim != spec.head_dim,
    }
    return next((reason for reason, asked in features.items() if asked), None)
