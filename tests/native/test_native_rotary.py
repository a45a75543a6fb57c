"""The native rotary embedding: the bits of torch's operators, forward and backward."""

import pytest
import torch

import polyshard as ps
from polyshard.attention.rotary import apply_rotary, rotate_heads
from polyshard.native.build import unavailable_reason
from polyshard.native.rotary import SOURCE, supports

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(unavailable_reason(SOURCE) is not None, reason=f"{unavailable_reason(SOURCE)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (96, 64), (32, 32)])
def test_it_has_the_bits_of_torchs_operators(dim, rotary_dim, dtype):
    generator = torch.Generator().manual_seed(1)
    merged = torch.randn(2, 7, 5 * dim, generator=generator).to(dtype).requires_grad_()
    q, k = (part.unflatten(-1, (-1, dim)) for part in merged.split([4 * dim, dim], dim=-1))
    cos, sin = ps.RotaryEmbedding(dim, rotary_dim=rotary_dim)(torch.arange(14).view(2, 7), dtype)
    assert supports(q, cos)
    found = rotate_heads(q, k, cos, sin)
    wanted = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in wanted]
    gradients = [torch.autograd.grad(results, merged, weights)[0] for results in (found, wanted)]
    assert all(torch.equal(a, b) for a, b in zip((*found, gradients[0]), (*wanted, gradients[1])))


def test_sizes_that_do_not_fill_registers_are_left_to_torch():
    q, k = torch.randn(3, 2, 20), torch.randn(3, 1, 20)
    cos, sin = ps.RotaryEmbedding(20)(torch.arange(3), torch.float32)
    assert not supports(q, cos)
    assert torch.equal(rotate_heads(q, k, cos, sin)[0], apply_rotary(q, cos, sin))


def test_a_second_derivative_is_refused():
    q, k = torch.randn(3, 2, 32, requires_grad=True), torch.randn(3, 1, 32)
    rotated, _ = rotate_heads(q, k, *ps.RotaryEmbedding(32)(torch.arange(3), torch.float32))
    (gradient,) = torch.autograd.grad(rotated.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
