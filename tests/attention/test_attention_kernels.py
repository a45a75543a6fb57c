"""Every attention kernel that runs here against attention written out in float64, and as compiled code sees it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention_cases import FEATURES, LENGTHS, SLOPES, bound_of, case, cumulative
from support.oracles.attention import attention

import polyshard as ps
from polyshard.attention import explain, select_kernel, selection
from polyshard.attention.kernels import attention_operator as operator
from polyshard.attention.kernels.cpu import kernels as cpu
from polyshard.attention.kernels.cpu.native import SOURCE
from polyshard.core.attention import AttentionSpec
from polyshard.core.capabilities import Accepted
from polyshard.native import build
from polyshard.native.build import width

CPU = torch.device("cpu")
KERNELS = ["cpu", "cpu_native", "cpu_flash", "chunked", pytest.param("vllm", marks=pytest.mark.vllm)]


def differences(tensors, lengths, kernel, key_lengths=None, **features):
    """For the output and each gradient: largest difference from float64, and the size of what is compared."""
    q, k, v, grad_out, sinks = tensors
    leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks) if t is not None]
    wide = [t.double().requires_grad_() for t in (q, k, v, sinks) if t is not None]
    options = dict(features)
    options["sliding_window"] = options.pop("window", None)
    options["alibi_slopes"] = options.pop("slopes", None)
    if key_lengths is not None:
        options["keys"] = cumulative(key_lengths)
    given_sinks = leaves[3] if sinks is not None else None
    out = ps.packed_attention(*leaves[:3], cumulative(lengths), kernel=kernel, sinks=given_sinks, **options)
    assert out.dtype == q.dtype
    out.backward(grad_out)
    wide_sinks = wide[3] if sinks is not None else None
    want = attention(*wide[:3], lengths, key_lengths, sinks=wide_sinks, **features)
    want.backward(grad_out.double())
    # One-token sequences have no gradient but what rounding leaves of |dO| |v| |k|.
    noise = 0.02 * q.shape[2] ** -0.5
    for tensor in (grad_out, v, k):
        noise *= float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    pairs = [(out, want, 0.0)] + [(a.grad, b.grad, noise) for a, b in zip(leaves, wide)]
    for got, wanted, least in pairs:
        if got.numel():
            yield float((got.double() - wanted).detach().abs().max()), max(float(wanted.detach().abs().max()), least)


def lacks(kernel, feature, dtype):
    """Whether a kernel says that it has not got this: it must not run it without."""
    if kernel == "cpu_native":
        odd = [d for d in (FEATURES[feature].get("value_dim", 32), 32) if d % width()]
        return dtype == torch.float64 or feature in ("soft-cap", "alibi", "everything") or bool(odd)
    if kernel == "cpu_flash":
        return "window" in feature or feature.split()[0] in ("soft-cap", "alibi", "values", "everything")
    return kernel == "vllm" and (dtype == torch.float64 or feature == "window, not causal")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_and_gradients_equal_attention_written_out(kernel, feature, dtype):
    features = dict(FEATURES[feature])
    shape = {name: features.pop(name, None) for name in ("key_lengths", "value_dim", "sinks")}
    tensors = case(LENGTHS, 4, 2, 32, dtype, **shape)
    if lacks(kernel, feature, dtype):
        with pytest.raises(ps.ConfigurationError, match=f"{kernel}: (has no|needs|computes in)"):
            list(differences(tensors, LENGTHS, kernel, shape["key_lengths"], **features))
        return
    found = differences(tensors, LENGTHS, kernel, shape["key_lengths"], **features)
    for difference, size in found:
        assert difference <= bound_of(dtype) * size


@pytest.mark.parametrize("feature", ["alibi", "soft-cap", "window", "sinks", "values wider", "not causal"])
@pytest.mark.parametrize("fused", [True, False])
def test_sequences_long_enough_for_torchs_operator_keep_their_features(monkeypatch, feature, fused):
    monkeypatch.setattr(cpu.native, "is_faster", lambda run, call: fused)
    features = dict(FEATURES[feature])
    shape = {name: features.pop(name, None) for name in ("value_dim", "sinks")}
    tensors = case((1100, 7), 4, 2, 16, torch.float32, **shape)
    for difference, size in differences(tensors, (1100, 7), "cpu", **features):
        assert difference <= bound_of(torch.float32) * size


lengths_of = st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, 90)), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    lengths=lengths_of,
    extra=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (9, 3)]),
    dim=st.sampled_from([8, 32, 56, 112]),
    value_dim=st.sampled_from([None, 16, 72, 80]),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 100)),
    softcap=st.one_of(st.none(), st.floats(0.5, 50.0)),
    alibi=st.booleans(),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    kernel=st.sampled_from(["cpu", "chunked"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_any_lengths_any_mask(
    lengths, extra, heads, dim, value_dim, causal, window, softcap, alibi, sinks, dtype, kernel, seed
):
    keys = tuple(n + e for n, e in zip(lengths, extra))
    tensors = case(lengths, *heads, dim, dtype, seed, keys, value_dim, sinks)
    features = {"causal": causal, "window": window, "softcap": softcap}
    features["slopes"] = [0.3 / (h + 1) for h in range(heads[0])] if alibi else None
    for difference, size in differences(tensors, lengths, kernel, keys, **features):
        # The reference's own entries may all but cancel; then the inputs' size counts.
        assert difference <= bound_of(dtype) * max(size, 1.0)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, {"dropout": 0.3}, {"softcap": 2.0}, {"sinks": True}])
def test_backward_is_the_derivative_of_the_forward(changes):
    changes = dict(changes)
    torch.manual_seed(0)
    shapes = [(9, 4, 8), (9, 2, 8), (9, 2, 5)] + ([(4,)] if changes.pop("sinks", False) else [])
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def fixed_seed(q, k, v, sinks=None):
        torch.manual_seed(5)
        return ps.packed_attention(q, k, v, torch.tensor([0, 3, 9]), sinks=sinks, kernel="chunked", **changes)

    assert torch.autograd.gradcheck(fixed_seed, inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_does_not_narrow_what_a_kernel_widens(kernel):
    """Selective recomputation switches autocast off inside of operators, so that it would change the loss."""
    q, k, v = (torch.randn(12, 2, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    outcomes = []
    for narrows in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrows):
            out = ps.packed_attention(*leaves, cumulative((5, 7)), kernel=kernel)
            outcomes.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for plain, cast in zip(*outcomes):
        assert torch.equal(cast, plain)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_operator_keeps_torchs_contract(with_sinks, dropout):
    q, k, v, _, sinks = case((5, 5, 30), 4, 2, 16, torch.float32, sinks=with_sinks)
    tensors = [None if t is None else t.requires_grad_() for t in (q, k, v)]
    bounds = cumulative((5, 5, 30)).int()
    seed = torch.tensor(3) if dropout else None
    if sinks is not None:
        sinks.requires_grad_()
    arguments = (*tensors, bounds, bounds, None, None, sinks, None, seed)
    settings_ = ("chunked", 0.25, True, None, None, dropout, 0, True)
    torch.library.opcheck(operator._attention, (*arguments, *settings_))


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break_and_for_any_lengths(backend):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    rotary = ps.RotaryEmbedding(16)
    module = ps.TrainableFlashAttention(64, 4, 2, rotary=rotary, qk_norm_eps=1e-6, sinks=True, softcap=5.0)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for bounds in ([0, 7, 20], [0, 3, 9, 20], [0, 20]):
        x = torch.randn(20, 64, requires_grad=True)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        outs = [f(x, cu_seqlens=cu_seqlens) for f in (compiled, module)]
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*gradients)
    assert counters["stats"]["unique_graphs"] <= 2, "compiled again for other lengths"
    assert not counters["graph_break"]


@pytest.mark.usefixtures("compiles")
def test_equal_layers_share_one_compiled_graph():
    """Dynamo guards on a layer's request; a graph for each layer would reach its recompile limit at eight."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    layers = [ps.TrainableFlashAttention(32, 2, 1, layer_index=index) for index in range(10)]
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    x = torch.randn(12, 32, requires_grad=True)
    for layer in layers:
        layer(x).square().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_dropout_depends_on_seed_head_and_token_alone():
    """Other tiles, other neighbours' lengths, other ranks' heads: the same weights are dropped."""
    q, k, v, *_ = case((40, 30), 4, 2, 16, torch.float32)

    def run(q, k, v, lengths, kernel="cpu"):
        torch.manual_seed(7)
        return ps.packed_attention(q, k, v, cumulative(lengths), dropout=0.5, kernel=kernel)

    whole = run(q, k, v, (40, 30))
    assert torch.equal(run(q, k, v, (40, 30)), whole)
    torch.testing.assert_close(run(q, k, v, (40, 20, 10))[:60], whole[:60])
    torch.manual_seed(8)
    assert not torch.equal(ps.packed_attention(q, k, v, cumulative((40, 30)), dropout=0.5), whole)


def test_dropout_drops_its_share_and_keeps_the_mean():
    v = torch.eye(64).unsqueeze(1).repeat(1, 4, 1)  # the output is the weights
    q = k = torch.zeros(64, 4, 64)
    torch.manual_seed(0)
    outs = torch.stack([ps.packed_attention(q, k, v, dropout=0.25, causal=False) for _ in range(200)])
    assert abs(float((outs == 0).float().mean()) - 0.25) < 0.002
    assert float((outs.mean(0) * 64 - 1).abs().max()) < 0.25
    flat = (outs == 0).float().flatten(1)
    neighbours = torch.corrcoef(flat[:, :64].T) - torch.eye(64)
    assert float(neighbours.abs().mean()) < 0.1  # 200 draws: 0.056 by chance


@pytest.mark.usefixtures("compiles")
def test_the_flex_kernel_runs_forward_on_cpu_and_refuses_to_train_there():
    tensors = case((5, 20), 4, 2, 16, torch.float32, sinks=True)
    q, k, v, _, sinks = tensors
    with torch.no_grad():
        features = {"sliding_window": 6, "softcap": 2.0, "alibi_slopes": SLOPES}
        out = ps.packed_attention(q, k, v, cumulative((5, 20)), sinks=sinks, kernel="flex", **features)
    want = attention(*(t.double() for t in (q, k, v)), (5, 20), window=6, softcap=2.0, slopes=SLOPES, sinks=sinks)
    assert float((out - want).abs().max()) < 1e-5
    with pytest.raises(ps.ConfigurationError, match="flex: has no backward on CPU"):
        ps.packed_attention(q.requires_grad_(), k, v, kernel="flex")


def spec_of(heads=4, kv_heads=2, dim=16, **changes):
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5, **changes)


def test_the_choice_of_a_kernel_has_reasons():
    refused = {v.name: v.reason for v in explain(spec_of(), CPU, torch.float32, True) if not isinstance(v, Accepted)}
    assert refused["torch_varlen"] == "needs CUDA, not cpu"
    assert refused["flash_attn_4"] == "needs CUDA, not cpu"
    assert refused["flex"] == "has no backward on CPU"
    assert select_kernel(spec_of(dropout=0.1), CPU, torch.float32, True).name == "cpu"


def test_a_kernel_can_be_forced_but_never_drops_a_feature(monkeypatch):
    assert select_kernel(spec_of(), CPU, torch.float32, True, "chunked").name == "chunked"
    monkeypatch.setenv("POLYSHARD_ATTENTION", "chunked")
    assert select_kernel(spec_of(), CPU, torch.float32, True).name == "chunked"
    with pytest.raises(
        ps.ConfigurationError, match="'cpu_flash' does not support the request: cpu_flash: has no dropout"
    ):
        select_kernel(spec_of(dropout=0.1), CPU, torch.float32, True, "cpu_flash")
    assert select_kernel(spec_of(dropout=0.1), CPU, torch.float32, False, "cpu_flash").name == "cpu_flash"
    with pytest.raises(ps.ConfigurationError, match="kernel is unknown: got 'fast', expected one of flash_attn_4"):
        select_kernel(spec_of(), CPU, torch.float32, True, "fast")


@pytest.fixture
def no_library_yet(monkeypatch, tmp_path):
    """As on a machine where nothing was compiled yet."""
    monkeypatch.setenv("POLYSHARD_CACHE", str(tmp_path))
    caches = (build._load_or_reason, selection._select)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no-such-compiler was not found. Install g.. or set CXX"),
        ("false", "false could not compile attention.cpp"),
    ],
)
def test_without_a_compiler_the_loops_say_so_and_tiles_do_their_work(monkeypatch, no_library_yet, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(ps.ConfigurationError, match=reason):
        select_kernel(spec_of(), CPU, torch.float32, True, "cpu_native")
    tensors = case(LENGTHS, 4, 2, 32, torch.float32)
    for difference, size in differences(tensors, LENGTHS, "cpu"):
        assert difference <= bound_of(torch.float32) * size
    assert not list(no_library_yet.iterdir()), "something half built was left behind"


def test_the_loops_are_compiled_once_and_whole(no_library_yet):
    assert select_kernel(spec_of(), CPU, torch.float32, True, "cpu_native").name == "cpu_native"
    (built,) = no_library_yet.iterdir()
    when = built.stat().st_mtime_ns
    build._load_or_reason.cache_clear()
    assert build.unavailable_reason(SOURCE) is None
    assert [p.stat().st_mtime_ns for p in no_library_yet.iterdir()] == [when]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2e4, -2e4])
def test_the_loops_hide_no_number_that_is_none(bad):
    """Scores without bound, and NaN with whatever payload: as the tiles have it."""
    q, k, v, *_ = case((40, 9), 4, 2, 32, torch.float32)
    q[7, 1, 3] = bad
    q[8, 2, 5] = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32) if math.isnan(bad) else 1.0
    ours, tiles = (ps.packed_attention(q, k, v, cumulative((40, 9)), kernel=name) for name in ("cpu_native", "chunked"))
    torch.testing.assert_close(ours, tiles, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_loops_give_the_same_bits_with_any_threads(threads):
    tensors = case(LENGTHS, 4, 2, 32, torch.float32)
    before = torch.get_num_threads()

    def gradients():
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        out = ps.packed_attention(*leaves, cumulative(LENGTHS), kernel="cpu_native")
        return out, *torch.autograd.grad(out, leaves, tensors[3])

    try:
        torch.set_num_threads(1)
        alone = gradients()
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, gradients()))
    finally:
        torch.set_num_threads(before)


def test_strided_and_empty_tensors_are_taken():
    fused = torch.randn(12, 8, 16)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:].transpose(1, 2).contiguous().transpose(1, 2)
    bounds = cumulative((5, 7))
    torch.testing.assert_close(
        ps.packed_attention(q, k, v, bounds), ps.packed_attention(*(t.contiguous() for t in (q, k, v)), bounds)
    )
    none = [t[:0].clone().requires_grad_() for t in (q, k, v)]
    out = ps.packed_attention(*none, torch.tensor([0, 0, 0]))
    out.sum().backward()
    assert out.shape == (0, 4, 16)
    assert none[0].grad.shape == (0, 4, 16)


def good():
    return {"q": torch.randn(6, 4, 8), "k": torch.randn(6, 2, 8), "v": torch.randn(6, 2, 8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(6, 32)}, r"wrong shape: got q \(6, 32\), .*expected \[tokens, heads, head_dim\]"),
        ({"k": torch.randn(6, 3, 8), "v": torch.randn(6, 3, 8)}, "query heads that are a multiple of the KV heads"),
        ({"v": torch.randn(5, 2, 8)}, "expected equal tokens and heads of k and v"),
        ({"q": torch.randn(6, 4, 16)}, "equal head_dim of q and k"),
        ({"q": torch.randn(6, 4, 8).bfloat16()}, "got torch.bfloat16, torch.float32 .* expected one float dtype"),
        ({n: torch.ones(6, 2, 8, dtype=torch.int64) for n in "qkv"}, "got torch.int64, .* expected one float dtype"),
        ({"q": torch.randn(6, 4, 8, device="meta")}, "different devices: got .*, expected one device"),
        ({"q": torch.randn(5, 4, 8)}, "got 5 tokens in q and 6 in k and v, .*Pass the boundaries of the keys"),
        ({"sinks": torch.zeros(3)}, r"sinks has the wrong shape: got \(3,\), expected \[heads\] = \(4,\)"),
        ({"alibi_slopes": [1.0]}, "ALiBi slopes is wrong: got 1, expected one for each of 4"),
        ({"sequences": torch.tensor([0, 4])}, "expected non-decreasing values from 0 to 6, the number of tokens"),
        ({"sequences": torch.tensor([0, 5, 3, 6])}, "expected non-decreasing values from 0"),
        ({"sequences": torch.tensor([0.0, 6.0])}, "expected integers"),
        ({"sequences": torch.tensor([6])}, "expected integers"),
        ({"keys": torch.tensor([0, 3, 6])}, "key sequences is wrong: got 2, expected 1"),
        ({"softcap": 0.0}, "softcap is out of range: got 0.0, expected a positive number"),
        ({"sliding_window": 0}, "sliding_window is invalid: got 0, expected a positive integer"),
        ({"dropout": 1.0}, r"dropout is out of range: got 1.0, .* in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        ps.packed_attention(**{**good(), **changes})


def test_boundaries_made_for_other_tokens_are_refused():
    with pytest.raises(ps.ConfigurationError, match="got 5 tokens in the sequences, expected the 6 of q"):
        ps.packed_attention(**good(), sequences=ps.pack(torch.tensor([0, 5]), 5))


def test_more_tokens_than_int32_counts_are_refused():
    with pytest.raises(ps.ConfigurationError, match="got 2147483648 tokens, expected at most 2147483647"):
        ps.pack(torch.tensor([0, 2**31]), 2**31)
