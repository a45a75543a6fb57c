"""The gradient of `unbind` against that of `Tensor.unbind`."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from polyshard.adapters.shared.unbind import unbind


def gradients(split, dtype, used, recompute=False):
    """The gradient after each of two backward passes, the second of which adds to the first."""
    stacked = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).to(dtype)

    def loss(whole):
        parts = split(2 * whole)
        return sum((x @ parts[index].T).square().sum() for index in used)

    found = []
    for _ in range(2):
        (checkpoint(loss, stacked, use_reentrant=False) if recompute else loss(stacked)).backward()
        found.append(stacked.grad.clone())
    return torch.stack(found)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (2, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_torch(dtype, used, recompute):
    expected = gradients(lambda whole: whole.unbind(0), dtype, used, recompute)
    assert torch.equal(gradients(unbind, dtype, used, recompute), expected)


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    stacked = torch.ones(2, 3, requires_grad=True)
    loss = (unbind(stacked)[1] * 3).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert stacked.grad.tolist() == [[0.0] * 3, [6.0] * 3]
