"""`TrainableFlashAttention`: the module around the kernels."""

import pytest
import torch
from support.workers import on_context_ranks

import polyshard as ps
from polyshard.testing import run_ranks


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


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 4, 9]), "expected non-decreasing values from 0 to 10,"),
        (torch.tensor([0, 7, 4, 10]), "expected non-decreasing values from 0"),
        (torch.tensor([1, 10]), "expected non-decreasing values from 0"),
        (torch.tensor([0.0, 10.0]), "expected integers"),
        (torch.tensor([10]), "expected integers"),
    ],
)
def test_bad_boundaries_are_refused(cu_seqlens, message):
    attention = ps.TrainableFlashAttention(32, 4)
    with pytest.raises(ps.ConfigurationError, match=message):
        attention(torch.randn(10, 32), cu_seqlens=cu_seqlens)


def test_bad_settings_are_refused():
    with pytest.raises(ps.ConfigurationError, match=r"got 10, expected a multiple of 4 heads\. Pass head_dim"):
        ps.TrainableFlashAttention(10, 4)
    with pytest.raises(ps.ConfigurationError, match=r"dropout is out of range: got 1.0, .* in \[0, 1\)"):
        ps.TrainableFlashAttention(8, 4, dropout=1.0)
    with pytest.raises(ps.LayoutError, match="4 query heads cannot share 3 key-value heads"):
        ps.TrainableFlashAttention(8, 4, 3)
    with pytest.raises(ps.ConfigurationError, match=r"expected \[batch, seq, hidden\] or packed"):
        ps.TrainableFlashAttention(8, 4)(torch.randn(8))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_every_feature_and_dropout_over_two_tensor_parallel_ranks_equal_one(sequence_parallel):
    """Run under activation checkpointing. One key-value head is held by both ranks."""
    for pairs in run_ranks(on_context_ranks.over_the_tensor_axis, 2, sequence_parallel):
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * max(1.0, float(wanted.abs().max())))
