"""Every kernel that this GPU has against attention written out in float64. Run with `python -m pytest -m gpu`."""

import pytest
import torch
from support.attention_cases import FEATURES, LENGTHS, bound_of, case, cumulative
from support.oracles.attention import attention

import polyshard as ps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = ["flash_attn_4", "flash_attn_3", "flash_attn_2", "torch_varlen", "flex", "chunked", "vllm"]


@pytest.mark.usefixtures("compiles")  # flex
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_and_gradients_equal_attention_written_out(kernel, feature, dtype, record_property):
    features = dict(FEATURES[feature])
    shape = {name: features.pop(name, None) for name in ("key_lengths", "value_dim", "sinks")}
    q, k, v, grad_out, sinks = case(LENGTHS, 4, 2, 32, dtype, **shape)
    leaves = [t.cuda().requires_grad_() for t in (q, k, v, sinks) if t is not None]
    wide = [t.double().requires_grad_() for t in (q, k, v, sinks) if t is not None]
    options = {"causal": True, **features}
    options["sliding_window"] = options.pop("window", None)
    options["alibi_slopes"] = options.pop("slopes", None)
    if shape["key_lengths"] is not None:
        options["keys"] = cumulative(shape["key_lengths"]).cuda()
    given = leaves[3] if sinks is not None else None
    try:
        out = ps.packed_attention(*leaves[:3], cumulative(LENGTHS).cuda(), kernel=kernel, sinks=given, **options)
    except ps.ConfigurationError as error:
        pytest.skip(str(error))
    out.backward(grad_out.cuda())
    wide_sinks = wide[3] if sinks is not None else None
    want = attention(*wide[:3], LENGTHS, shape["key_lengths"], sinks=wide_sinks, **features)
    want.backward(grad_out.double())
    errors = {}
    for name, got, wanted in [("out", out, want), *((n, a.grad, b.grad) for n, a, b in zip("qkvs", leaves, wide))]:
        difference = (got.detach().cpu().double() - wanted.detach()).abs().max()
        errors[name] = float(difference) / float(wanted.detach().abs().max())
    record_property("relative_errors", errors)
    assert max(errors.values()) <= bound_of(dtype)
