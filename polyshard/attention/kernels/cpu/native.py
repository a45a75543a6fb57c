"""Runs of a packed batch through the compiled loops; tensors are read and written where they lie."""

from __future__ import annotations

import ctypes
import functools

import torch

from polyshard.attention.kernels.cpu.tiles import Run
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec
from polyshard.native.build import NATIVE, library, unavailable_reason, width

SOURCE = NATIVE / "attention.cpp"
_MOST_KEYS = 8192  # from 16384 on torch's operator is faster


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
    """Why the loops cannot compute it: what they do not have, then what this machine does not."""
    return unsupported_feature(spec, dtype) or unavailable_reason(SOURCE)


@functools.cache  # asked for every run of every pass
def unsupported_feature(spec: AttentionSpec, dtype: torch.dtype) -> str | None:
    """What of a request the loops do not have."""
    lanes = width()
    features = {
        f"computes in float32, not {str(dtype).removeprefix('torch.')}": dtype != torch.float32,
        "has no dropout": bool(spec.dropout),
        "has no logit soft-cap": spec.softcap is not None,
        "has no ALiBi": spec.alibi_slopes is not None,
        f"needs head sizes that are multiples of {lanes}, not {spec.head_dim} and {spec.v_dim}": bool(
            lanes and (spec.head_dim % lanes or spec.v_dim % lanes)
        ),
    }
    return next((reason for reason, asked in features.items() if asked), None)


def is_faster(run: Run, call: AttentionCall) -> bool:
    """Whether the loops are the fastest: a task for every thread, and weights that do not leave the caches."""
    return run.keys <= _MOST_KEYS and run.count * call.spec.num_kv_heads >= torch.get_num_threads()


def forward_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    run: Run,
    call: AttentionCall,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> None:
    """Fill a run's part of `out` `[tokens, heads, value_dim]` and `logsumexp`; all float32 with contiguous rows."""
    places = ((q, run.query), (k, run.key), (v, run.key), (out, run.query), (logsumexp, run.query))
    assert all(x.dtype == torch.float32 for x, _ in places)
    library(SOURCE).polyshard_attention_forward(_run(run, call), *(packed(*place) for place in places))


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
    """Fill a run's part of the gradients of q, k and v; all are float32 with contiguous rows."""
    grad_q, grad_k, grad_v = grads
    places = ((grad_out, run.query), (q, run.query), (k, run.key), (v, run.key), (out, run.query))
    results = ((logsumexp, run.query), (grad_q, run.query), (grad_k, run.key), (grad_v, run.key))
    assert all(x.dtype == torch.float32 for x, _ in (*places, *results))
    library(SOURCE).polyshard_attention_backward(_run(run, call), *(packed(*place) for place in (*places, *results)))


def _run(run: Run, call: AttentionCall) -> object:
    spec = call.spec
    sizes = (run.count, run.rows, run.keys, run.shift, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_dim)
    rest = (int(spec.causal), spec.sliding_window or 0, torch.get_num_threads(), spec.scale)
    return ctypes.byref(_Run(*sizes, *rest))


def packed(x: torch.Tensor, first: int) -> object:
    """`x [tokens, heads(, dim)]` from token `first` on, its last dimension contiguous."""
    assert x.dim() == 2 or x.stride(-1) == 1
    place = x.data_ptr() + first * x.stride(0) * x.element_size()
    return ctypes.byref(_Packed(place, x.stride(0), x.stride(1)))
