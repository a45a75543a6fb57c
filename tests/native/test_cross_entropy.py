"""The native cross-entropy against float64, forward and backward."""

import math

import pytest
import torch
from torch.nn import functional as F

import polyshard as ps
from polyshard.native.build import unavailable_reason
from polyshard.native.cross_entropy import SOURCE, supports

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(unavailable_reason(SOURCE) is not None, reason=f"{unavailable_reason(SOURCE)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 16, 33, 1000, 49152])
def test_losses_and_gradients_are_those_of_float64(size, dtype):
    generator = torch.Generator().manual_seed(size)
    logits = (4 * torch.randn(9, size, generator=generator)).to(dtype)
    labels = torch.randint(size, (9,), generator=generator)
    labels[3] = -100
    x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    assert supports(x)
    loss = ps.vocab_parallel_cross_entropy(x, labels, ps.initialize("torch"), reduction="none")
    wanted = F.cross_entropy(wide, labels, reduction="none")
    weights = torch.rand(9, generator=generator)
    loss.backward(weights)
    wanted.backward(weights.double())
    assert (loss.dtype, x.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=torch.finfo(dtype).eps + 2e-6, atol=1e-7)
    assert not x.grad[3].any()


def test_logits_of_any_stride_give_the_same_bits():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(6, 40, generator=generator), torch.arange(6)
    context = ps.initialize("torch")
    inside = torch.cat((logits, logits), dim=1)[:, :40]
    for other in (inside, logits.T.contiguous().T):
        found = ps.vocab_parallel_cross_entropy(other, labels, context, reduction="none")
        assert torch.equal(found, ps.vocab_parallel_cross_entropy(logits, labels, context, reduction="none"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_makes_the_loss_none(bad):
    logits = torch.zeros(2, 20)
    logits[0, 7] = bad
    losses = ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 2]), ps.initialize("torch"), reduction="none")
    assert losses[0].isnan()
    assert losses[1].item() == pytest.approx(math.log(20))


def test_a_column_of_minus_infinity_has_no_weight():
    logits = torch.zeros(1, 20)
    logits[0, 7:] = -math.inf
    logits.requires_grad_()
    loss = ps.vocab_parallel_cross_entropy(logits, torch.tensor([1]), ps.initialize("torch"))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(7))
    assert not logits.grad[0, 7:].any()
