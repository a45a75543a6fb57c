"""TrainableFlashAttention and its kernels against attention written out in float64."""

import math

import pytest
import torch

import polyshard as ps
from polyshard.attention import explain, select_kernel
from polyshard.attention.kernels.chunked import Chunked
from polyshard.attention.kernels.cpu_flash import CpuFlash
from polyshard.attention.packing import packed
from polyshard.core.attention import AttentionSpec
from polyshard.core.capabilities import Accepted

CPU = torch.device("cpu")
LENGTHS = (5, 5, 1, 0, 17, 300)


def written_out(q, k, v, lengths, spec):
    """Softmax attention, sequence by sequence, in the dtype of its inputs."""
    outs, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        group = spec.num_heads // spec.num_kv_heads
        keys, values = (t[part].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = q[part].transpose(0, 1) @ keys.transpose(1, 2) * spec.scale
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        hidden = (j > i) if spec.causal else torch.zeros(length, length, dtype=torch.bool)
        if spec.sliding_window is not None:
            hidden = hidden | ((i - j).abs() >= spec.sliding_window)
        outs.append((scores.masked_fill(hidden, -math.inf).softmax(-1) @ values).transpose(0, 1))
        start += length
    return torch.cat(outs)


def run(function, inputs, grad_out):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(grad_out)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def spec_of(heads=4, kv_heads=2, dim=16, **changes):
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        (CpuFlash(), {}),
        (CpuFlash(), {"causal": False}),
        (Chunked(), {}),
        (Chunked(), {"causal": False}),
        (Chunked(), {"sliding_window": 7}),
        (Chunked(), {"sliding_window": 290}),
        (Chunked(), {"sliding_window": 7, "causal": False}),
    ],
)
def test_kernels_equal_attention_written_out(kernel, changes, heads, dtype):
    """Bounds: a few roundings of the dtype, relative to the largest entry (bfloat16: 2^-8)."""
    spec = spec_of(*heads, **changes)
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    q, grad_out = (torch.randn(tokens, heads[0], 16).to(dtype) for _ in range(2))
    k, v = (torch.randn(tokens, heads[1], 16).to(dtype) for _ in range(2))
    sequences = packed(torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)]), tokens)
    assert kernel.rejects(spec, CPU, dtype, training=True) is None
    got = run(lambda *t: kernel(*t, sequences, spec, True), (q, k, v), grad_out)
    want = run(lambda *t: written_out(*t, LENGTHS, spec), [t.double() for t in (q, k, v)], grad_out.double())
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, want):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() < bound * b.abs().max()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, {"dropout": 0.3}])
def test_the_chunked_kernels_backward_is_its_forwards_derivative(changes):
    spec = spec_of(4, 2, 8, **changes)
    sequences = packed(torch.tensor([0, 3, 9]), 9)
    torch.manual_seed(0)
    q = torch.randn(9, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def fixed_seed(*tensors):
        torch.manual_seed(5)
        return Chunked()(*tensors, sequences, spec, True)

    assert torch.autograd.gradcheck(fixed_seed, (q, k, v))


def test_dropout_is_reproducible_unbiased_and_off_in_evaluation():
    attention = ps.TrainableFlashAttention(64, 4, dropout=0.4)
    x = torch.randn(2, 10, 64)
    torch.manual_seed(1)
    first = attention(x)
    torch.manual_seed(1)
    assert torch.equal(attention(x), first)
    assert not torch.equal(attention(x), first)
    mean = torch.stack([attention(x).detach() for _ in range(600)]).mean(0)
    attention.eval()
    exact = attention(x)
    assert torch.equal(attention(x), exact)
    assert (mean - exact).abs().max() < 0.2 * exact.abs().max()


def test_the_seeds_example_runs_as_it_is_written():
    from polyshard import TrainableFlashAttention

    attn = TrainableFlashAttention(hidden_size=768, num_heads=12, dropout=0.1)
    attn.train()
    hidden_states = torch.randn(2, 16, 768, requires_grad=True)
    output = attn(hidden_states)
    loss = output.sum()
    loss.backward()
    assert hidden_states.grad is not None
    assert attn.qkv.weight.grad is not None


def test_packed_and_batched_input_agree():
    rotary = ps.RotaryEmbedding(16)
    attention = ps.TrainableFlashAttention(64, 4, 2, qk_norm_eps=1e-6, rotary=rotary, qkv_bias=True)
    x = torch.randn(3, 7, 64)
    cu_seqlens = torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    torch.testing.assert_close(attention(x.flatten(0, 1), cu_seqlens=cu_seqlens).view(3, 7, 64), attention(x))
    one_by_one = torch.cat([attention(row) for row in x]).view(3, 7, 64)
    torch.testing.assert_close(one_by_one, attention(x))


def test_the_choice_of_a_kernel_has_reasons():
    plain = explain(spec_of(), CPU, torch.float32, training=True)
    assert [str(v) for v in plain if not isinstance(v, Accepted)] == ["torch_varlen: needs CUDA, not cpu"]
    assert select_kernel(spec_of(), CPU, torch.float32, True).name == "cpu_flash"
    assert select_kernel(spec_of(dropout=0.1), CPU, torch.float32, True).name == "chunked"
    assert select_kernel(spec_of(dropout=0.1), CPU, torch.float32, False).name == "cpu_flash"
    assert select_kernel(spec_of(sliding_window=4), CPU, torch.float32, True).name == "chunked"


def test_a_kernel_can_be_forced_but_never_drops_a_feature(monkeypatch):
    assert select_kernel(spec_of(), CPU, torch.float32, True, "chunked").name == "chunked"
    monkeypatch.setenv("POLYSHARD_ATTENTION", "chunked")
    assert select_kernel(spec_of(), CPU, torch.float32, True).name == "chunked"
    with pytest.raises(ps.ConfigurationError, match="'cpu_flash' was asked for, but cpu_flash: has no dropout"):
        select_kernel(spec_of(dropout=0.1), CPU, torch.float32, True, "cpu_flash")
    with pytest.raises(ps.ConfigurationError, match="unknown attention kernel 'fast'; known: torch_varlen, cpu_flash"):
        select_kernel(spec_of(), CPU, torch.float32, True, "fast")


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 4, 9]), "must rise from 0 to the 10 tokens given"),
        (torch.tensor([0, 7, 4, 10]), "must rise from 0"),
        (torch.tensor([1, 10]), "must rise from 0"),
        (torch.tensor([0.0, 10.0]), "must be integers"),
        (torch.tensor([10]), "must be integers"),
    ],
)
def test_bad_boundaries_are_refused(cu_seqlens, message):
    attention = ps.TrainableFlashAttention(32, 4)
    with pytest.raises(ps.ConfigurationError, match=message):
        attention(torch.randn(10, 32), cu_seqlens=cu_seqlens)


def test_bad_settings_are_refused():
    with pytest.raises(ps.ConfigurationError, match="hidden size 10 is not a multiple of 4 heads: give head_dim"):
        ps.TrainableFlashAttention(10, 4)
    with pytest.raises(ps.ConfigurationError, match=r"dropout must lie in \[0, 1\)"):
        ps.TrainableFlashAttention(8, 4, dropout=1.0)
    with pytest.raises(ps.LayoutError, match="4 query heads cannot share 3 key-value heads"):
        ps.TrainableFlashAttention(8, 4, 3)
    with pytest.raises(ps.ConfigurationError, match=r"must be \[batch, seq, hidden\] or packed"):
        ps.TrainableFlashAttention(8, 4)(torch.randn(8))
