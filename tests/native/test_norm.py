"""The compiled norm against float64; and that a row's bits are its own."""

import pytest
import torch

from polyshard.native.build import unavailable_reason
from polyshard.native.norm import SOURCE, rms_norm, rms_norm_backward, supports

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(unavailable_reason(SOURCE) is not None, reason=f"the norm {unavailable_reason(SOURCE)}")


def expected(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (5, 16), (7, 2, 33), (0, 8), (40, 576)], ids=str)
def test_it_is_the_norm_in_float64_rounded(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in (shape, shape[-1:]))
    assert supports(x)
    for scale, eps in ((1.0, 1e-5), (1e-3, 1e-6), (0.0, 1e-6)):
        got, want = rms_norm(x * scale, weight, eps), expected(x * scale, weight, eps)
        assert got.dtype == dtype
        assert ((got.double() - want).abs() <= (torch.finfo(dtype).eps / 2 + 5e-7) * want.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (7, 2, 33), (0, 8), (40, 576)], ids=str)
def test_its_gradients_are_those_of_float64_rounded(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    x, weight, gradient = (torch.randn(s, generator=generator).to(dtype) for s in (shape, shape[-1:], shape))
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    expected(*wide, 1e-5).backward(gradient.double())
    to_x, to_weight = rms_norm_backward(x, weight, gradient, 1e-5)
    strided = torch.cat((gradient, gradient), dim=-1)[..., : shape[-1]]
    assert torch.equal(rms_norm_backward(x, weight, strided, 1e-5)[0], to_x)
    assert (to_x.dtype, to_weight.dtype) == (dtype, torch.float32)
    terms = (expected(x, weight, 1e-5) * gradient.double() / x.double()).abs().amax(-1, keepdim=True)  # they may cancel
    assert ((to_x.double() - wide[0].grad).abs() <= torch.finfo(dtype).eps * wide[0].grad.abs() + 2e-6 * terms).all()
    torch.testing.assert_close(to_weight.double(), wide[1].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_row_do_not_depend_on_the_batch(dtype):
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((60, 70), (70,)))
    whole = rms_norm(x, weight, 1e-5)
    assert torch.equal(torch.cat([rms_norm(part, weight, 1e-5) for part in x.split(7)]), whole)
    assert torch.equal(rms_norm(torch.cat((x, x), dim=1)[:, :70], weight, 1e-5), whole)
    assert torch.equal(rms_norm(x.view(3, 4, 5, 70), weight, 1e-5), whole.view(3, 4, 5, 70))
    x[3] = torch.nan
    got = rms_norm(x, weight, 1e-5)
    assert got[3].isnan().all()
    assert torch.equal(got[4:], whole[4:])


def test_a_compiled_graph_calls_it_by_name():
    from torch._inductor.utils import run_and_get_code

    x, weight = torch.randn(9, 64), torch.rand(64)
    graph = torch.compile(lambda x: torch.relu(rms_norm(x, weight, 1e-5)) if supports(x) else x, fullgraph=True)
    found, (code,) = run_and_get_code(graph, x)
    assert torch.equal(found, torch.relu(rms_norm(x, weight, 1e-5)))
    assert "polyshard.rms_norm" in code
