"""Attention over a paged cache by the compiled loops; float64 is the oracle."""

import pytest
import torch
from support.oracles.attention import attention

from polyshard.attention.alibi import standard_slopes
from polyshard.attention.kernels.cpu import native_paged as paged
from polyshard.core.attention import AttentionSpec
from polyshard.native import build

pytestmark = pytest.mark.skipif(not build.width(), reason="no compiled loops for this processor")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SPARE = 9  # pages that belong to nobody


def spec_of(kv_heads, group, dim, window=None, **changes):
    sizes = {"num_heads": kv_heads * group, "num_kv_heads": kv_heads, "head_dim": dim, "scale": dim**-0.5}
    return AttentionSpec(**sizes, sliding_window=window, **changes)


def in_pages(k, v, tokens):
    """A cache that holds the keys and values of each sequence, NaN where it holds nothing; keys, values, table."""
    kv_heads, dim = k[0].shape[1:]
    needed = [-(-len(t) // tokens) for t in k]
    places = torch.randperm(sum(needed) + SPARE).tolist()
    both = torch.full((len(places), kv_heads, 2, tokens * dim), torch.nan, dtype=k[0].dtype)
    at_keys, at_values = both.unbind(2)
    at_keys, at_values = at_keys.unflatten(-1, (dim, tokens)), at_values.unflatten(-1, (tokens, dim))
    table = torch.full((len(k), max(needed)), 2**31 - 1, dtype=torch.int32)
    for i, pages in enumerate(needed):
        for page in range(pages):
            table[i, page] = place = places.pop()
            keys, values = (t[i][page * tokens : (page + 1) * tokens] for t in (k, v))
            at_keys[place, :, :, : len(keys)] = keys.permute(1, 2, 0)
            at_values[place, :, : len(keys)] = values.transpose(0, 1)
    return at_keys, at_values, table


def cached(rows, keys, spec, dtype, tokens):
    """Queries, keys and values of each request; the cache that holds them; its requests."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q = [torch.randn(m, heads, dim).to(dtype) for m in rows]
    k, v = ([torch.randn(n, kv_heads, dim).to(dtype) for n in keys] for _ in "kv")
    at_keys, at_values, table = in_pages(k, v, tokens)
    return q, k, v, at_keys, at_values, requests_of(rows, keys, table)


def requests_of(rows, keys, table):
    bounds = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    return paged.Requests(bounds, torch.tensor(keys, dtype=torch.int32), table)


def expected(q, k, v, spec, sinks=None):
    """Of all requests, in float64."""
    lengths, seen = [len(t) for t in q], [len(t) for t in k]
    q, k, v = (torch.cat(t).double() for t in (q, k, v))
    settings = {"window": spec.sliding_window, "softcap": spec.softcap, "slopes": spec.alibi_slopes, "sinks": sinks}
    return attention(q, k, v, lengths, seen, scale=spec.scale, **settings)


def check(rows, keys, spec, dtype, tokens, sinks=None):
    q, k, v, at_keys, at_values, requests = cached(rows, keys, spec, dtype, tokens)
    wide = torch.full((sum(rows) + 2, spec.num_heads, spec.head_dim + 16), 7, dtype=dtype)
    out = wide[1:-1, :, : spec.head_dim]  # between what must not be written
    paged.attend(torch.cat(q), paged.Pages(at_keys, at_values, spec), requests, out, sinks)
    exact = expected(q, k, v, spec, sinks)
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert (wide[0] == 7).all()
    assert (wide[-1] == 7).all()
    assert (wide[..., spec.head_dim :] == 7).all()
    return out


FEATURES = {  # of the spec, and sinks
    "soft-cap": ({"softcap": 2.0}, None),
    "a soft-cap that saturates": ({"softcap": 0.01}, None),
    "ALiBi": ({"alibi_slopes": (0.5, 0.25, 0.1, 0.01, 1.0, 0.0)}, None),
    "sinks": ({}, torch.tensor([0.0, 1.0, -3.0, 8.0, 200.0, -200.0])),
    "all": ({"softcap": 2.0, "alibi_slopes": (0.5, 0.1, 0.0, 0.2, 0.3, 0.4)}, torch.arange(-1.0, 5.0)),
}
CASES = {
    "decoding": ([1] * 5, [1, 31, 32, 33, 400]),
    "new prompts": ([70, 1, 200], [70, 1, 200]),
    "later chunks": ([50, 3, 130], [300, 64, 131]),
    "all of them, and one without queries": ([1, 40, 90, 0, 7, 2], [77, 333, 90, 20, 7, 500]),
    "many blocks of keys": ([1, 30], [1500, 2100]),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.parametrize("case", CASES)
def test_requests(case, window, dtype):
    torch.manual_seed(1)
    for kv_heads, group, dim, tokens in ((2, 3, 64, 32), (1, 8, 80, 64), (3, 1, 128, 128)):
        check(*CASES[case], spec_of(kv_heads, group, dim, window), dtype, tokens)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, window, case, dtype):
    torch.manual_seed(1)
    changes, sinks = FEATURES[feature]
    for kv_heads, group, dim, tokens in ((2, 3, 64, 32), (1, 6, 80, 64)):
        check(*CASES[case], spec_of(kv_heads, group, dim, window, **changes), dtype, tokens, sinks)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 48])
def test_outputs_are_rounded_once(dim, dtype):
    """Heads of 64 are whole registers of bfloat16 pairs, where the processor multiplies pairs; heads of 48 are not."""
    torch.manual_seed(dim)
    spec, lengths = spec_of(2, 2, dim), [5, 300, 17]
    q, k, v, at_keys, at_values, requests = cached(lengths, lengths, spec, dtype, 32)
    out = torch.empty_like(torch.cat(q))
    paged.attend(torch.cat(q), paged.Pages(at_keys, at_values, spec), requests, out)
    exact = expected(q, k, v, spec)
    assert ((out.double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6).all()


def test_a_prompt_of_several_tasks():
    torch.manual_seed(1)
    check([900], [900], spec_of(1, 2, 32), torch.float32, 32)
    check([1700], [2000], spec_of(2, 1, 32), torch.float32, 32)


def test_a_wider_processor(tmp_path, monkeypatch):
    """Registers of sixteen floats, which the compiler makes of two where the processor has none, give the same bits."""
    other = tmp_path / "paged.cpp"
    other.write_text(f'#define POLYSHARD_WIDTH 16\n#include "{paged.SOURCE}"\n')
    monkeypatch.setenv("POLYSHARD_CACHE", str(tmp_path))
    assert build.unavailable_reason(other) is None
    for dtype in TOLERANCE:
        for index, (rows, keys) in enumerate(CASES.values()):
            changes, sinks = FEATURES["all"] if index % 2 else ({}, None)
            outs, spec = [], spec_of(2, 3 if index % 2 else 1, 64, (None, 40, None)[index % 3], **changes)
            for source in (paged.SOURCE, other):
                monkeypatch.setattr(paged, "SOURCE", source)
                torch.manual_seed(index)
                outs.append(check(rows, keys, spec, dtype, 32, sinks))
            assert torch.equal(*outs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 1, 150])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(3, 3, 64), (1, 8, 80), (2, 1, 128), (1, 16, 32)])
def test_what_a_query_gives_depends_on_its_sequence_alone(threads, dtype, window, kv_heads, group, dim, monkeypatch):
    """Bit for bit: whatever stands beside it, whatever chunk it comes in, however large pages are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(3)
    changes = {} if window is None else {"softcap": 1.5, "alibi_slopes": tuple(standard_slopes(kv_heads * group))}
    spec, lengths = spec_of(kv_heads, group, dim, window, **changes), [700, 1300]
    sinks = torch.randn(kv_heads * group)

    def attended(q, k, v, tokens):
        at_keys, at_values, table = in_pages(k, v, tokens)
        out = torch.empty_like(torch.cat(q))
        requests = requests_of([len(t) for t in q], [len(t) for t in k], table)
        paged.attend(torch.cat(q), paged.Pages(at_keys, at_values, spec), requests, out, sinks)
        return out.split([len(t) for t in q])

    q, k, v = ([torch.randn(n, m, dim).to(dtype) for n in lengths] for m in (kv_heads * group, kv_heads, kv_heads))
    whole = attended(q, k, v, 32)
    for tokens, step in ((32, 1), (128, 4), (64, 50), (128, 333)):
        for last in (1, 7, 65, 450, 511, 512, 513, 700):
            seen = [last, last + 600]
            parts = [t[max(n - step, 0) : n] for t, n in zip(q, seen)]
            found = attended(parts, *([t[:n] for t, n in zip(of, seen)] for of in (k, v)), tokens)
            for mine, all_of_it, n in zip(found, whole, seen):
                assert torch.equal(mine, all_of_it[n - len(mine) : n]), (tokens, step, n)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 90.0, -4.0, 7.0, 0.0, -100.0])])
def test_the_logsumexp_of_each_query(window, sinks):
    torch.manual_seed(4)
    spec, rows, keys = spec_of(2, 3, 64, window), [1, 300, 5], [800, 300, 40]
    q, k, _, at_keys, at_values, requests = cached(rows, keys, spec, torch.float32, 32)
    out, found = torch.empty_like(torch.cat(q)), torch.full((sum(rows), 6), torch.nan)
    paged.attend(torch.cat(q), paged.Pages(at_keys, at_values, spec), requests, out, sinks, found)
    for mine, one, its in zip(found.split(rows), q, k):
        scores = torch.einsum("qhd,khd->hqk", one.double(), its.double().repeat_interleave(3, 1)) * spec.scale
        apart = torch.arange(len(its) - len(one), len(its))[:, None] - torch.arange(len(its))
        scores.masked_fill_((apart < 0) | (apart >= (window or len(its))), -torch.inf)
        total = scores.logsumexp(-1).T
        if sinks is not None:
            total = torch.logaddexp(total, sinks.double())
        torch.testing.assert_close(mine.double(), total, atol=1e-5, rtol=1e-6)


def test_large_scores_of_a_later_block_take_over():
    """What was summed before them is scaled to nothing, and nothing overflows."""
    spec = spec_of(1, 1, 32)
    torch.manual_seed(1)
    q, _, v, at_keys, at_values, requests = cached([20], [1100], spec, torch.float32, 32)
    last = int(requests.table[0, 1070 // 32])
    at_keys[last, 0, :, 1070 % 32] = 300 * q[0][-1, 0]
    out = torch.empty_like(q[0])
    paged.attend(q[0], paged.Pages(at_keys, at_values, spec), requests, out)
    torch.testing.assert_close(out[-1], v[0][1070])


def test_a_request_is_enough_for_as_many_threads_as_it_has_tasks(monkeypatch):
    bounds, seen = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([900], dtype=torch.int32)
    one = paged.Requests(bounds, seen, torch.zeros(1, 30, dtype=torch.int32))
    for kv_heads, queries, threads in ((1, 1, 1), (2, 1, 2), (1, 1000, 5), (2, 1000, 10)):
        for more in (0, 1):
            monkeypatch.setattr(torch, "get_num_threads", lambda n=threads + more: n)
            assert paged.is_faster(one, queries, spec_of(kv_heads, 2, 64)) is not bool(more)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"head_dim": 36}, "multiples"),
        ({"value_dim": 32}, "value_dim equal to head_dim"),
        ({"causal": False}, "causal"),
    ],
)
def test_what_it_does_not_have_is_said(changes, reason):
    asked = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "scale": 0.1, **changes}
    assert reason in paged.unsupported_reason(AttentionSpec(**asked))
