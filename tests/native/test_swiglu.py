"""`ps.swiglu` against float64, forward and backward, and that torch.compile takes it."""

import pytest
import torch
from torch.nn import functional as F

import polyshard as ps

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expected(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (3, 5, 64), (0, 8), (33, 3072)], ids=str)
def test_forward_and_backward_are_those_of_float64_rounded(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    x = (4 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, y_wide = ps.swiglu(x), expected(wide)
    weights = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(weights)
    y_wide.backward(weights.double())
    # One rounding to the dtype, after a few in float32; torch's own operations round thrice in bfloat16.
    bound = {torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps / 2 + 1e-6)
    assert y.dtype == x.grad.dtype == dtype
    assert ((y.double() - y_wide).abs() <= bound * y_wide.abs() + 1e-7).all()
    assert ((x.grad.double() - wide.grad).abs() <= 3 * bound * (wide.grad.abs() + 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forward_has_the_same_bits_with_and_without_gradients_in_any_batch(dtype):
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = ps.swiglu(x)
    assert torch.equal(ps.swiglu(x.clone().requires_grad_()), whole)
    assert torch.equal(torch.cat([ps.swiglu(row) for row in x.split(7)]), whole)
    assert torch.equal(ps.swiglu(torch.cat((x, x), dim=1)[:, :200]), whole)


def test_far_from_zero_and_not_a_number():
    values = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, torch.nan])
    both = torch.cat((values, torch.ones_like(values)))
    got = ps.swiglu(both.unsqueeze(0))[0]
    torch.testing.assert_close(got[:7].double(), expected(both)[:7], rtol=1e-6, atol=1e-36)
    assert got[7].isnan()


@pytest.mark.usefixtures("compiles")
def test_a_compiled_graph_fuses_torchs_operations():
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    compiled = torch.compile(ps.swiglu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ps.swiglu(x))


def test_of_a_layer_it_is_the_activation_of_its_output():
    layer = torch.nn.Linear(6, 8)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(ps.swiglu(x, layer), ps.swiglu(layer(x)))


def test_an_odd_size_is_refused():
    with pytest.raises(ps.ConfigurationError, match="last dimension: got 5"):
        ps.swiglu(torch.ones(2, 5))
