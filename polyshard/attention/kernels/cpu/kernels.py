"""The CPU kernels. Each splits a packed batch into runs and computes every run with tiles, torch's operator or C++.

Measured with benchmarks/attention.py on one thread: the native kernel is the fastest; in bfloat16 it takes about half
the time of tiles. Without a compiler, in float32 tiles are the fastest up to about a thousand tokens, and torch's flash
operator for longer sequences; in bfloat16 tiles are the fastest at any length. Padding and block masks are slower.
With AMX, in bfloat16, the forward pass of torch's flash operator takes 0.5 to 0.8 of the native kernel's time, and its
backward pass more than the native one's up to a thousand tokens, so each computes one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from typing_extensions import override

from polyshard.attention.kernels import attention_operator as operator
from polyshard.attention.kernels.cpu import chunked, native
from polyshard.attention.kernels.cpu import flash as cpu_flash
from polyshard.attention.kernels.cpu.tiles import Run, runs
from polyshard.attention.kernels.protocol import AttentionCall, AttentionKernel, BlockKernel
from polyshard.attention.kernels.softmax import wide
from polyshard.core.attention import AttentionSpec
from polyshard.native.build import has_instructions

_LONG = 1024  # number of keys from which torch's operator is faster than tiles in float32
_LONG_IN_TILES = 2048  # number of keys from which its backward pass is faster than the native one with AMX

Way = Literal["tiles", "flash", "native"]


class _ByRun(AttentionKernel, BlockKernel):
    """A `BlockKernel` that computes a call run by run."""

    name: str
    native_sinks = False

    def way(self, run: Run, call: AttentionCall, dtype: torch.dtype) -> Way:
        """Return the implementation for this run."""
        raise NotImplementedError

    def forward_way(self, run: Run, call: AttentionCall, dtype: torch.dtype) -> Way:
        """Return the implementation of this run's forward pass: "tiles" exactly if `way` is, as it saves weights."""
        return self.way(run, call, dtype)

    @override
    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        return operator.attend(self, q, k, v, call, sinks)

    @override
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (_contiguous_rows(t) for t in (q, k, v))
        work, kept = self._work(q, call, self.forward_way)
        if _filled(work, q, k):
            out = q.new_empty((*q.shape[:2], v.shape[-1]))
            logsumexp = q.new_empty(q.shape[:2], dtype=wide(q.dtype))
        else:
            out = q.new_zeros((*q.shape[:2], v.shape[-1]))
            logsumexp = torch.full(q.shape[:2], -math.inf, dtype=wide(q.dtype), device=q.device)
        saved = q.new_empty(sum(kept))
        for (run, way), part in zip(work, saved.split(kept)):
            match way:
                case "native":
                    native.forward_run(q, k, v, run, call, out, logsumexp)
                case "flash":
                    cpu_flash.forward_run(q, k, v, run, call, out, logsumexp)
                case "tiles":
                    chunked.forward_run(q, k, v, run, call, out, logsumexp, part)
        return out, logsumexp, saved

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
        grad_out, q, k, v, out = (_contiguous_rows(t) for t in (grad_out, q, k, v, out))
        work, kept = self._work(q, call, self.way)
        new = torch.Tensor.new_empty if _filled(work, q, k) else torch.Tensor.new_zeros
        grads = (new(q, q.shape), new(k, k.shape), new(v, v.shape))
        for (run, way), part in zip(work, saved.split(kept)):
            match way:
                case "native":
                    native.backward_run(grad_out, q, k, v, out, logsumexp, run, call, grads)
                case "flash":
                    cpu_flash.backward_run(grad_out, q, k, v, out, logsumexp, run, call, grads)
                case "tiles":
                    chunked.backward_run(grad_out, q, k, v, out, logsumexp, part, run, call, grads)
        return grads

    def _work(
        self, q: torch.Tensor, call: AttentionCall, way: Callable[[Run, AttentionCall, torch.dtype], Way]
    ) -> tuple[list[tuple[Run, Way]], list[int]]:
        """Return the runs that have keys, each with its implementation, and the number of weights that each saves."""
        work = [(run, way(run, call, q.dtype)) for run in runs(call) if run.keys]
        return work, [chunked.saved_elements(run, call, q) if way == "tiles" else 0 for run, way in work]


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with a contiguous last dimension, as the native kernel requires."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _filled(work: list[tuple[Run, Way]], q: torch.Tensor, k: torch.Tensor) -> bool:
    """Return whether every row of all results will be written: such runs write all rows, and cover all tokens."""
    rows, keys = sum(run.count * run.rows for run, _ in work), sum(run.count * run.keys for run, _ in work)
    return all(way != "tiles" for _, way in work) and (rows, keys) == (len(q), len(k))


class Chunked(_ByRun):
    """Tiles of batched matmuls: supports every feature on any device."""

    name = "chunked"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        if device.type == "meta":
            return "needs a device with memory, not meta"
        return None if dtype.is_floating_point else f"needs a float dtype, not {dtype}"

    def way(self, run: Run, call: AttentionCall, dtype: torch.dtype) -> Way:
        """Return "tiles"."""
        return "tiles"


class Cpu(Chunked):
    """The fastest CPU implementation for each run of sequences."""

    name = "cpu"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        if device.type != "cpu":
            return f"needs a CPU, not {device.type}"
        return super().unsupported_reason(spec, device, dtype, training)

    def way(self, run: Run, call: AttentionCall, dtype: torch.dtype) -> Way:
        """Return "native" if it supports the run and is the fastest, else "flash" for long sequences, else "tiles"."""
        if call.alibi_slopes is not None:  # the spec of the custom operator lacks the slopes, which are a tensor
            return "tiles"
        if native.is_faster(run, call) and native.unsupported_reason(call.spec, dtype) is None:
            return "flash" if run.keys >= _LONG_IN_TILES and _takes_tiles(run, call, dtype) else "native"
        return "flash" if run.keys >= _LONG and _flash_supports(run, call) else "tiles"

    @override
    def forward_way(self, run: Run, call: AttentionCall, dtype: torch.dtype) -> Way:
        """Return "flash" instead of "native" for bfloat16 on processors with AMX, else what `way` returns."""
        way = self.way(run, call, dtype)
        return "flash" if way == "native" and _takes_tiles(run, call, dtype) else way


class CpuNative(_ByRun):
    """The native (C++) kernel for all runs."""

    name = "cpu_native"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        return native.unsupported_reason(spec, dtype) if device.type == "cpu" else f"needs a CPU, not {device.type}"

    def way(self, run: Run, call: AttentionCall, dtype: torch.dtype) -> Way:
        """Return "native"."""
        return "native"


class CpuFlash(_ByRun):
    """torch's `_scaled_dot_product_flash_attention_for_cpu` for all runs that it supports."""

    name = "cpu_flash"

    @override
    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        if device.type != "cpu":
            return f"needs a CPU, not {device.type}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"has no {dtype}"
        return flash_unsupported_reason(spec)

    def way(self, run: Run, call: AttentionCall, dtype: torch.dtype) -> Way:
        """Return "flash", or "tiles" for alignments that torch's operator does not support."""
        return "flash" if cpu_flash.supports(run, call) else "tiles"


def _takes_tiles(run: Run, call: AttentionCall, dtype: torch.dtype) -> bool:
    """Return whether torch's operator supports the run and multiplies tiles of bfloat16 (AMX)."""
    return dtype == torch.bfloat16 and has_instructions("amx_bf16") and _flash_supports(run, call)


def _flash_supports(run: Run, call: AttentionCall) -> bool:
    return cpu_flash.supports(run, call) and flash_unsupported_reason(call.spec) is None


def flash_unsupported_reason(spec: AttentionSpec) -> str | None:
    """Return the first feature of `spec` that torch's CPU operator does not support, or None."""
    features = {
        "has no dropout": bool(spec.dropout),
        "has no sliding window": spec.sliding_window is not None,
        "has no softcap": spec.softcap is not None,
        "has no ALiBi": spec.alibi_slopes is not None,
        f"needs value_dim equal to head_dim, not {spec.v_dim} and {spec.head_dim}": spec.v_dim != spec.head_dim,
    }
    return next((reason for reason, requested in features.items() if requested), None)
