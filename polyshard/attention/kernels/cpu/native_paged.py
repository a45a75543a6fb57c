"""The native kernel (C++) for attention of a batch of requests over a paged KV cache. Forward pass only."""

from __future__ import annotations

import ctypes

import torch

from polyshard.attention.kernels.cpu.native import packed
from polyshard.core.attention import AttentionSpec
from polyshard.native.build import KINDS, NATIVE, library, unavailable_reason, width

SOURCE = NATIVE / "paged_attention.cpp"
PAGE = 32  # the number of tokens in a page must be a multiple of this
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
    """The requests of one step, shared by all layers.

    Args:
        bounds: int32 `[requests + 1]`, cumulative numbers of queries.
        seen: int32 `[requests]`, number of keys of each request; its queries are the last of them.
        table: int32 `[requests, pages of the longest request]`, page indices. Entries past a request's end are not
            read.
    """

    def __init__(self, bounds: torch.Tensor, seen: torch.Tensor, table: torch.Tensor) -> None:
        assert all(t.dtype == torch.int32 and t.stride(-1) == 1 for t in (bounds, seen, table))
        assert len(bounds) == len(seen) + 1 == len(table) + 1
        self.bounds, self.seen, self.table = bounds, seen, table
        pointers = (bounds.data_ptr(), seen.data_ptr(), table.data_ptr())
        self.pointers = ctypes.byref(_Requests(*pointers, len(seen), table.stride(0)))


class Pages:
    """Pointers to a layer's KV cache. Built once for each layer, since decoding takes only microseconds.

    The object does not keep the cache alive.

    Args:
        keys: `[pages, kv_heads, dim, tokens]`, contiguous within a head of a page.
        values: `[pages, kv_heads, tokens, dim]`, with the same page and head strides and the same dtype, one of
            `KINDS`.
        spec: the layer's spec, for which `unsupported_reason` returns None.
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
    """Return why the kernel does not support a request: a missing feature, or a missing compiler or processor."""
    lanes = width()
    features = {
        "has only causal attention": not spec.causal,
        "has no dropout": bool(spec.dropout),
        f"needs value_dim equal to head_dim, not {spec.v_dim} and {spec.head_dim}": spec.v_dim != spec.head_dim,
        f"needs head sizes that are multiples of {lanes}, not {spec.head_dim}": bool(lanes and spec.head_dim % lanes),
    }
    return next((reason for reason, requested in features.items() if requested), None) or unavailable_reason(SOURCE)


def is_faster(requests: Requests, queries: int, spec: AttentionSpec) -> bool:
    """Return whether every thread has work. A task is a KV head of a request, or of `_ROWS` rows of one request."""
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
    """Compute attention in float32, without autograd. Each query's output depends bit for bit only on its sequence.

    Args:
        q: `[queries, heads, dim]` in the pages' dtype; each head must be contiguous.
        pages: the layer's KV cache.
        requests: the step's requests.
        out: tensor in the shape and dtype of `q` to which the output is written; may be a part of a larger tensor.
        sinks: `[heads]`, a logit of each head that is added to the softmax's sum; None without sinks.
        logsumexp: float32 `[queries, heads]` to which the logsumexp of scores and sink is written; None to omit it.
    """
    assert q.shape[1:] == out.shape[1:] == pages.shape, (q.shape, out.shape, pages.shape)
    assert q.dtype == pages.dtype == out.dtype, (q.dtype, pages.dtype, out.dtype)
    wide = None if sinks is None else sinks.detach().float().contiguous()
    sums = None if logsumexp is None else packed(logsumexp)
    threads = ctypes.c_int64(torch.get_num_threads())
    library(SOURCE).polyshard_attention_paged(
        KINDS[q.dtype],
        requests.pointers,
        *pages.pointers,
        packed(q),
        packed(out),
        ctypes.c_void_p(None if wide is None else wide.data_ptr()),
        sums,
        threads,
    )
