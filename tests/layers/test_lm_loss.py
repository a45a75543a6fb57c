"""The head and its loss in chunks: equal to the loss of all logits, without holding them."""

import pytest
import torch
import torch.nn.functional as F
from support.workers.chunked_loss import losses_and_gradients, losses_without_rows
from torch.utils.flop_counter import FlopCounterMode

import polyshard as ps
from polyshard.testing import run_ranks

ADAPTERS = ("torch", "megatron", "deepspeed", "fairscale")


@pytest.mark.parametrize(
    ("adapter", "sequence_parallel", "bias"),
    [
        *((adapter, False, False) for adapter in ADAPTERS),
        ("torch", True, False),
        ("megatron", True, True),  # the bias has a gradient hook, which runs once
    ],
)
def test_losses_and_gradients_are_those_of_all_logits(adapter, sequence_parallel, bias):
    sizes = {"tensor": 2, "sequence_parallel": sequence_parallel}
    for chunked, plain in run_ranks(losses_and_gradients, 2, adapter, sizes, bias):
        assert torch.equal(chunked["losses"], plain["losses"])  # each token's loss, bit for bit
        assert torch.equal(chunked["logprobs"], plain["logprobs"])
        torch.testing.assert_close(chunked["mean"], plain["mean"], rtol=1e-6, atol=0)
        for name in ("hidden", "weight", *(["bias"] if bias else [])):
            torch.testing.assert_close(chunked[name], plain[name], rtol=1e-5, atol=1e-7)


def test_no_row_has_no_loss_under_sequence_parallel():
    for found in run_ranks(losses_without_rows, 2, {"tensor": 2, "sequence_parallel": True}):
        assert found == [0.0, 0.0]


@pytest.mark.vllm
def test_exact_mode_gives_the_same_bits():
    ((chunked, plain),) = run_ranks(losses_and_gradients, 1, "torch", {"exact": True})
    assert torch.equal(chunked["logprobs"], plain["logprobs"])
    assert torch.equal(chunked["losses"], plain["losses"])


def test_the_largest_tensor_is_that_of_a_chunk():
    context = ps.initialize("torch")
    head = ps.lm_head(16, 4096, context)
    hidden, labels = torch.randn(512, 16, requires_grad=True), torch.randint(0, 4096, (512,))

    def peak(loss):
        with torch.profiler.profile(profile_memory=True) as profile:
            loss().backward()
        live = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        return most

    plain = peak(lambda: ps.vocab_parallel_cross_entropy(head(hidden), labels, context))
    chunked = peak(lambda: ps.lm_loss(hidden, head, labels, context, chunk_tokens=32))
    assert chunked < plain / 4


def test_the_head_is_multiplied_three_times_as_often_as_once():
    """Forward, gradient of the hidden states, gradient of the weight: no logits are computed again."""
    context = ps.initialize("torch")
    head = ps.lm_head(16, 64, context)
    hidden, labels = torch.randn(32, 16, requires_grad=True), torch.randint(0, 64, (32,))
    with FlopCounterMode(display=False) as counter:
        ps.lm_loss(hidden, head, labels, context, chunk_tokens=8).backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 16 * 64


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    context = ps.initialize("torch")
    head, hidden = ps.lm_head(4, 8, context), torch.randn(6, 4, requires_grad=frozen != "hidden")
    head.weight.requires_grad_(frozen != "weight")
    labels = torch.arange(6)
    ps.lm_loss(hidden, head, labels, context, chunk_tokens=2).backward()
    found = {"hidden": hidden.grad, "weight": head.weight.grad}
    assert found.pop(frozen) is None
    head.zero_grad()
    hidden.grad = None
    ps.vocab_parallel_cross_entropy(head(hidden), labels, context).backward()
    ((name, gradient),) = found.items()
    torch.testing.assert_close(gradient, {"hidden": hidden.grad, "weight": head.weight.grad}[name])


def test_the_gradient_of_a_bfloat16_head_is_accumulated_in_float32():
    context = ps.initialize("torch")
    head = ps.lm_head(16, 64, context)
    hidden, labels = torch.randn(4096, 16), torch.randint(0, 64, (4096,))
    ps.lm_loss(hidden.double(), head.double(), labels, context).backward()
    exact = head.weight.grad
    head.zero_grad()
    head.bfloat16()
    ps.lm_loss(hidden.bfloat16(), head, labels, context, chunk_tokens=16).backward()
    error = (head.weight.grad - exact).norm() / exact.norm()
    assert error < 0.006  # 0.003, as one product of all tokens; 256 sums in bfloat16 are 0.02 off


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_z_loss_is_that_of_torchs_log_sum_exp(reduction, dtype):
    context = ps.initialize("torch")
    head = ps.lm_head(16, 64, context).to(dtype)
    hidden = (3 * torch.randn(32, 16)).to(dtype).requires_grad_()
    labels = torch.randint(0, 64, (32,))
    labels[5] = -100
    settings = {"reduction": reduction, "z_loss": 0.01, "return_z_loss": True, "chunk_tokens": 8}
    loss, square = ps.lm_loss(hidden, head, labels, context, **settings)
    loss.sum().backward()

    leaf, weight = (t.detach().double().requires_grad_() for t in (hidden, head.weight))
    logits = leaf @ weight.T
    counted = (labels != -100).double()
    squares = 0.01 * logits.logsumexp(-1).square() * counted
    squares = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / counted.sum()}[reduction]
    want = F.cross_entropy(logits, labels, reduction=reduction) + squares
    want.sum().backward()
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found, expected in ((loss, want), (square, squares), (hidden.grad, leaf.grad), (head.weight.grad, weight.grad)):
        assert (found.detach().double() - expected.detach()).norm() <= bound * expected.detach().norm()


def test_wrong_calls_are_refused():
    context = ps.initialize("torch")
    head, hidden = ps.lm_head(4, 8, context), torch.randn(3, 4)
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ps.ConfigurationError, match="labels are no tensor: got list"):
        ps.lm_loss(hidden, head, [1, 2, 3], context)
    with pytest.raises(ps.ConfigurationError, match="hidden states are no tensor: got"):
        ps.lm_loss(head, hidden, labels, context)
    for options, message in (({"z_loss": "1"}, "z_loss is invalid: got '1'"), ({"label_smoothing": "1"}, "got '1'")):
        with pytest.raises(ValueError, match=message):
            ps.lm_loss(hidden, head, labels, context, **options)
    with pytest.raises(ValueError, match="temperature is invalid: got '1'"):
        ps.token_logprobs(head(hidden), labels, context, temperature="1")
    with pytest.raises(ValueError, match="targets are no tensor: got list"):
        ps.token_logprobs(head(hidden), [1, 2, 3], context)
    with pytest.raises(ps.ConfigurationError, match="chunk_tokens is invalid: got 0"):
        ps.lm_loss(hidden, head, torch.zeros(3, dtype=torch.int64), context, chunk_tokens=0)
    with pytest.raises(ps.ConfigurationError, match=r"labels have the wrong shape: got \(2,\), expected \(3,\)"):
        ps.lm_loss(hidden, head, torch.zeros(2, dtype=torch.int64), context)
    with pytest.raises(ValueError, match="label 9 is outside the vocabulary"):
        ps.lm_loss(hidden, head, torch.tensor([1, 9, 2]), context)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), {}, r"wrong shape: got \(3, 2\), expected \(2, 3\)"),
        (torch.zeros(2, 3), {}, "wrong dtype: got torch.float32"),
        (torch.full((2, 3), 9), {"vocab_size": 12}, "vocab_size is invalid: got 12, expected 1 to 8"),
        (torch.zeros(2, 3, dtype=torch.int64), {"temperature": 0.0}, "temperature is invalid: got 0.0"),
    ],
)
def test_wrong_calls_of_token_logprobs_are_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        ps.token_logprobs(torch.randn(2, 3, 8), ids, ps.initialize("torch"), **options)


def test_a_vocabulary_larger_than_the_logits_is_refused():
    with pytest.raises(ValueError, match="vocab_size is invalid: got 12, expected 1 to 8"):
        ps.vocab_parallel_cross_entropy(torch.randn(1, 8), torch.tensor([9]), ps.initialize("torch"), vocab_size=12)
