"""Exact mode of a mixture of experts: the experts that tokens take and every bit of their log-probabilities."""

import pytest
import support.vllm_required  # noqa: F401
import torch
from support import engines
from support.models.experts import VOCAB, save_moe

import polyshard as ps
from polyshard.adapters.vllm.engines import sampling
from polyshard.adapters.vllm.engines.sampling import SamplingJob
from polyshard.adapters.vllm.exact import exact_matmuls
from polyshard.cli.verify_exact import random_prompts
from polyshard.proof.certificate import TrainerCase, compare

FACTORY = "moe:build_model"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("exact") / "model", "qwen3_moe", head_dim=32)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "dtype", [dtype for dtype in ("bfloat16", "float32") if getattr(torch, dtype) in exact_matmuls()]
)
def test_trainers_at_any_size_give_the_bits_of_an_engine(directory, dtype):
    asked = SamplingJob(
        directory=str(directory), factory=FACTORY, dtype=dtype, prompts=random_prompts(VOCAB), tokens=16, shards=2
    )
    with engines.engine(asked.directory, **sampling.register_for(asked)) as llm:
        answers = sampling.answers_of(llm, asked)
    for tensor in (1, 2) if dtype == "bfloat16" else (2,):
        found = compare(TrainerCase(adapter="torch", tensor=tensor), answers, str(directory), FACTORY, dtype, 2)
        assert found.holds, found
        assert found.tokens == 16 * len(answers)


def test_gradients_are_those_of_the_ordinary_mode():
    torch.manual_seed(0)
    context = ps.initialize("torch")
    layers = [
        ps.mixture_of_experts(64, 32, 8, 3, where, router=ps.Router(normalize=True))
        for where in (context, ps.exact_context(context, shards=2))
    ]
    for layer in layers:
        ps.initialize_weights(layer, context, seed=1, initializer=ps.normal_initializer(0.2))
    x = torch.randn(9, 64)
    gradients = []
    for layer in layers:
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        gradients.append({"x": inputs.grad, **{n: p.grad for n, p in layer.named_parameters()}})
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=2e-6 * gradient.abs().max().item())


@pytest.mark.parametrize(
    ("router", "options"),
    [(ps.Router(score="sigmoid"), {}), (ps.Router(), {"shared": ps.SharedExperts(size=32, gated=True)})],
)
def test_routers_whose_bits_depend_on_the_batch_are_refused(router, options):
    context = ps.exact_context(ps.initialize("torch"))
    with pytest.raises(ps.AdapterError, match="exact mode does not support this router"):
        ps.mixture_of_experts(64, 32, 8, 2, context, router=router, **options)
