"""Attention of a batch of requests over a paged cache, by compiled loops; forward alone."""

from __future__ import annotations

import ctypes

import torch

from polyshard.attention.kernels.cpu.native import packed
from polyshard.core.attention import AttentionSpec
from polyshard.native.build import KINDS, NATIVE, library, unavailable_reason, width

SOURCE = NATIVE / "paged_attention.cpp"
PAGE = 32  # a page's tokens are a multiple of it
_ROWS = 384  # THIN of paged_attention.cpp


class _Requests(ctypes.Structure):
    """`Requests` of paged_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bounds", "seen", "table")),
        *((name, ctypes.c_int64) for name in ("count", "row")),
    )


class _Heads(ctypes.Structure):
    """`Heads` of paged_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        ("slopes", ctypes.c_void_p),
    )


class _Cache(ctypes.Structure):
    """`Cache` of paged_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("page", "head", "tokens")),
    )


class Requests:
    """A step's requests, for all its layers.

    Args:
        bounds: int32 `[requests + 1]`, cumulative numbers of queries.
        seen: int32 `[requests]`, keys of each, of which its queries are the last.
        table: int32 `[requests, pages of the longest]`; entries past a request's end are not read.
    """

    def __init__(self, bounds: torch.Tensor, seen: torch.Tensor, table: torch.Tensor) -> None:
        assert all(t.dtype == torch.int32 and t.stride(-1) == 1 for t in (bounds, seen, table))
        assert len(bounds) == len(seen) + 1 == len(table) + 1
        self.bounds, self.seen, self.table = bounds, seen, table
        pointers = (bounds.data_ptr(), seen.data_ptr(), table.data_ptr())
        self.pointers = ctypes.byref(_Requests(*pointers, len(seen), table.stride(0)))


class Pages:
    """Where a layer's cache lies, which it does not keep alive; made once: a layer decodes in some microseconds.

    Args:
        keys: `[pages, kv_heads, dim, tokens]`, of which a head of a page is contiguous.
        values: `[pages, kv_heads, tokens, dim]`, with the same strides, of the same dtype of `KINDS`.
        spec: of heads that `unsupported_reason` has nothing against.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, spec: AttentionSpec) -> None:
        pages, kv_heads, dim, tokens = keys.shape
        assert values.shape == (pages, kv_heads, tokens, dim), (keys.shape, values.shape)
        assert keys.stride() == (*values.stride()[:2], tokens, 1), (keys.stride(), values.stride())
        assert values.stride()[2:] == (dim, 1), values.stride()
        assert tokens % PAGE == 0, tokens
        assert (kv_heads, dim) == (spec.num_kv_heads, spec.head_dim), (kv_heads, dim)
        assert keys.dtype == values.dtype, (keys.dtype, values.dtype)
        self.dtype, self.shape = keys.dtype, (spec.num_heads, dim)
        self._slopes = None if spec.alibi_slopes is None else torch.tensor(spec.alibi_slopes, dtype=torch.float32)
        slopes = None if self._slopes is None else self._slopes.data_ptr()
        sizes = (spec.num_heads, kv_heads, dim, spec.sliding_window or 0)
        heads = _Heads(*sizes, spec.scale, spec.softcap or 0.0, slopes)
        cache = _Cache(keys.data_ptr(), values.data_ptr(), keys.stride(0), keys.stride(1), tokens)
        self.pointers = ctypes.byref(heads), ctypes.byref(cache)


def unsupported_reason(spec: AttentionSpec) -> str | None:
    """Why the loops cannot compute it: what they do not have, then what this machine does not."""
    lanes = width()
    features = {
        "is causal": not spec.causal,
        "has no dropout": bool(spec.dropout),
        f"needs keys and values of one size, not {spec.head_dim} and {spec.v_dim}": spec.v_dim != spec.head_dim,
        f"needs head sizes that are multiples of {lanes}, not {spec.head_dim}": bool(lanes and spec.head_dim % lanes),
    }
    return next((reason for reason, asked in features.items() if asked), None) or unavailable_reason(SOURCE)


def is_faster(requests: Requests, queries: int, spec: AttentionSpec) -> bool:
    """Whether there is a task for every thread: a key-value head of a request, or of so many rows of one."""
    group = spec.num_heads // spec.num_kv_heads
    tasks = max(len(requests.seen), queries * group // _ROWS) * spec.num_kv_heads
    return tasks >= torch.get_num_threads()


def attend(
    q: torch.Tensor,
    pages: Pages,
    requests: Requests,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
    logsumexp: torch.Tensor | None = None,
) -> None:
    """Attend in float32, without autograd. What a query gives depends on its sequence alone, bit for bit.

    Args:
        q: `[queries, heads, dim]` of the pages' dtype, a head contiguous.
        pages: see the class.
        requests: see the class.
        out: filled; of the shape and dtype of `q`, maybe part of a larger tensor.
        sinks: `[heads]`, a term of each head's sum that no key has; None for none.
        logsumexp: float32 `[queries, heads]`, filled with that of the scores and the sink; None where it is not wanted.
    """
    assert q.shape[1:] == out.shape[1:] == pages.shape, (q.shape, out.shape, pages.shape)
    assert q.dtype == pages.dtype == out.dtype, (q.dtype, pages.dtype, out.dtype)
    wide = None if sinks is None else sinks.detach().float().contiguous()
    sums = None if logsumexp is None else packed(logsumexp, 0)
    threads = ctypes.c_int64(torch.get_num_threads())
    library(SOURCE).polyshard_attention_paged(
        KINDS[q.dtype],
        requests.pointers,
        *pages.pointers,
        packed(q, 0),
        packed(out, 0),
        ctypes.c_void_p(None if wide is None else wide.data_ptr()),
        sums,
        threads,
    )
