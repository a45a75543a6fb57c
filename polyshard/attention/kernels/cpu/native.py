"""The native attention kernel (C++) for runs of packed sequences.

It reads and writes float32 tensors without copies. bfloat16 and float16 are converted, and the results rounded once.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from polyshard.attention.kernels.cpu.tiles import Run
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec
from polyshard.native.build import NATIVE, library, unavailable_reason, width

SOURCE = NATIVE / "attention.cpp"
_MAX_KEYS = 8192  # torch's operator is faster from 16384 keys on


class _Packed(ctypes.Structure):
    """`Packed` of attention.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64))


class _Run(ctypes.Structure):
    """`Run` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "rows", "keys", "shift", "heads", "kv_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("value_dim", "causal", "window", "threads")),
        ("scale", ctypes.c_float),
    )


def unsupported_reason(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Return why the kernel does not support a request: a missing feature, or a missing compiler or processor."""
    return unsupported_feature(spec, dtype) or unavailable_reason(SOURCE)


@functools.cache  # called for every run of every pass
def unsupported_feature(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """Return the first feature of a request that the kernel does not support, or None."""
    lanes = width()
    features = {
        f"computes in float32, not {str(dtype).removeprefix('torch.')}": dtype == torch.float64,
        "has no dropout": bool(spec.dropout),
        "has no softcap": spec.softcap is not None,
        "has no ALiBi": spec.alibi_slopes is not None,
        f"needs head sizes that are multiples of {lanes}, not {spec.head_dim} and {spec.v_dim}": bool(
            lanes and (spec.head_dim % lanes or spec.v_dim % lanes)
        ),
    }
    return next((reason for reason, requested in features.items() if requested), None)


def is_faster(run: Run, call: AttentionCall) -> bool:
    """Return whether this is the fastest kernel: every thread has work, and the weights stay in the caches."""
    return run.keys <= _MAX_KEYS and run.count * call.spec.num_kv_heads >= torch.get_num_threads()


def forward_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    run: Run,
    call: AttentionCall,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> None:
    """Write a run's part of `out` `[tokens, heads, value_dim]` and float32 `logsumexp`; all with contiguous rows."""
    queries, keys = run.query_rows, run.key_rows
    wide = [x[rows].float() for x, rows in ((q, queries), (k, keys), (v, keys))]
    result = out[queries] if out.dtype == torch.float32 else out[queries].float()
    library(SOURCE).polyshard_attention_forward(
        _run(run, call), *(packed(x) for x in (*wide, result, logsumexp[queries]))
    )
    if out.dtype != torch.float32:
        out[queries] = result


def backward_run(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    run: Run,
    call: AttentionCall,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write a run's part of the gradients of q, k and v; all tensors have contiguous rows."""
    queries, keys = run.query_rows, run.key_rows
    given = ((grad_out, queries), (q, queries), (k, keys), (v, keys), (out, queries), (logsumexp, queries))
    wide = [x[rows].float() for x, rows in given]
    parts = [grad[rows] for grad, rows in zip(grads, (queries, keys, keys))]
    results = [part if part.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32) for part in parts]
    library(SOURCE).polyshard_attention_backward(_run(run, call), *(packed(x) for x in (*wide, *results)))
    for part, result in zip(parts, results):
        if result is not part:
            part.copy_(result)


def _run(run: Run, call: AttentionCall) -> object:
    spec = call.spec
    sizes = (run.count, run.rows, run.keys, run.shift, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_dim)
    rest = (int(spec.causal), spec.sliding_window or 0, torch.get_num_threads(), spec.scale)
    return ctypes.byref(_Run(*sizes, *rest))


def packed(x: torch.Tensor) -> object:
    """Return a pointer to the C struct of `x [tokens, heads(, dim)]`, with contiguous `dim`."""
    assert x.dim() == 2 or x.stride(-1) == 1
    return ctypes.byref(_Packed(x.data_ptr(), x.stride(0), x.stride(1)))
