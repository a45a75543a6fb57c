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
TWO_SIZES = (TrainerCase(adapter="torch", tensor=1), TrainerCase(adapter="torch", tensor=2))
MASTERS = (TrainerCase(adapter="torch", tensor=2, masters=True),)  # float32 parameters
FAMILIES = [
    ("qwen3_moe", "float32", TWO_SIZES[1:]),
    ("qwen3_moe", "bfloat16", TWO_SIZES),
    ("deepseek_v3", "bfloat16", MASTERS),
    ("gpt_oss", "bfloat16", MASTERS),
]

STACKED = ps.ExpertStorage(stacked="gate_up_proj", down="down_proj")
LAYERS = {
    "Qwen3-MoE": {"router": ps.Router(normalize=True)},
    "Qwen2-MoE": {"router": ps.Router(), "shared": ps.SharedExperts(size=32, gated=True, name="shared_expert")},
    "DeepSeek-V3": {
        "router": ps.Router(
            score="sigmoid", normalize=True, correction_bias=True, groups=4, chosen_groups=2, scale=2.5
        ),
        "shared": ps.SharedExperts(size=32),
    },
    "Llama 4": {"router": ps.Router(score="sigmoid", scale_input=True), "storage": STACKED},
    "gpt-oss": {
        "router": ps.Router(score="softmax_of_chosen", bias=True),
        "storage": ps.ExpertStorage(stacked="gate_up_proj", down="down_proj", interleaved=True),
        "activation": ps.ClampedSwiglu(),
        "bias": True,
    },
}


@pytest.mark.vllm
@pytest.mark.parametrize(("kind", "dtype", "trainers"), FAMILIES)
def test_trainers_at_any_size_give_the_bits_of_an_engine(tmp_path, monkeypatch, kind, dtype, trainers):
    if getattr(torch, dtype) not in exact_matmuls():
        pytest.skip(f"exact mode does not support {dtype} on this CPU")
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    directory = str(save_moe(tmp_path / "model", kind, **({} if kind == "deepseek_v3" else {"head_dim": 32})))
    asked = SamplingJob(
        directory=directory, factory=FACTORY, dtype=dtype, prompts=random_prompts(VOCAB), tokens=16, shards=2
    )
    with engines.engine(directory, **sampling.register_for(asked)) as llm:
        answers = sampling.answers_of(llm, asked)
    for trainer in trainers:
        found = compare(trainer, answers, directory, FACTORY, dtype, 2)
        assert found.holds, found
        assert found.tokens == 16 * len(answers)


def layer_in(context, name):
    """A layer with random weights of which every second row of the router repeats the one before: ties."""
    layer = ps.mixture_of_experts(64, 32, 8, 3, context, **LAYERS[name])
    ps.initialize_weights(layer, context, seed=1, initializer=ps.normal_initializer(0.2))
    with torch.no_grad():
        layer.matrix.weight[1::2] = layer.matrix.weight[::2]
        for name in ("bias", "e_score_correction_bias"):
            if isinstance(getattr(layer.matrix, name, None), torch.nn.Parameter):
                getattr(layer.matrix, name).copy_(torch.linspace(-0.1, 0.1, 4).repeat_interleave(2))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_tokens_experts_and_bits_do_not_depend_on_the_batch(name):
    torch.manual_seed(0)
    layer = layer_in(ps.exact_context(ps.initialize("torch"), shards=2), name).eval()
    x = torch.randn(131, 64)
    with torch.no_grad(), ps.record_routing(layer) as together:
        y = layer(x)
    logits = layer.matrix(x)
    assert torch.equal(logits[:, ::2], logits[:, 1::2])
    for start, end in ((0, 1), (3, 5), (7, 24), (60, 131)):
        with torch.no_grad(), ps.record_routing(layer) as alone:
            assert torch.equal(layer(x[start:end]), y[start:end])
        assert torch.equal(alone[0][""], together[0][""][start:end])


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_ordinary_mode(name):
    torch.manual_seed(0)
    context = ps.initialize("torch")
    layers = [layer_in(where, name) for where in (context, ps.exact_context(context, shards=2))]
    x = torch.randn(9, 64)
    gradients = []
    for layer in layers:
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
        gradients.append({"y": y.detach(), "x": inputs.grad, **trained})
    assert set(gradients[0]) == set(gradients[1])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=0, atol=4e-6 * gradient.abs().max().item())
