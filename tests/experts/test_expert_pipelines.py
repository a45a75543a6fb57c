"""Experts inside pipeline stages train to the weights of one process, beside every other axis."""

import pytest
import torch
from safetensors.torch import load_file
from support.models.experts import save_moe
from support.models.tiny import VOCAB
from support.oracles.expert_pipelines import judge
from support.workers.expert_pipelines import ExpertCase, fails, train, train_and_resume

import polyshard as ps
from polyshard.testing import run_ranks

TIMEOUT = 5.0
FSDP = {"data_parallel": "fsdp"}
ZERO_0 = {"zero_stage": 0}
TENSOR = {"pipeline": 2, "tensor": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}
V = {"schedule": "zero-bubble-v"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "qwen3_moe"
    return str(save_moe(folder, "qwen3_moe", vocab_size=VOCAB, num_hidden_layers=4, mlp_only_layers=[1]))


BIASES = ps.Balance(sequence=0.01, z=0.001, bias_rate=0.01)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return str(save_moe(tmp_path_factory.mktemp("experts") / "deepseek_v3", "deepseek_v3", vocab_size=VOCAB))


def test_experts_and_a_pipeline(model, deepseek, tmp_path):
    names = ("1f1b", "interleaved-1f1b", "zero-bubble-v", "dualpipe-v")
    cases = [
        *(ExpertCase(name, model, {"schedule": name}) for name in names),
        ExpertCase("recompute", model, options={"recompute": "full"}),
        ExpertCase("ragged rows", model, V, kind="ragged rows", options={"recompute": "full"}),
        ExpertCase("packed, uneven lengths", model, kind="uneven"),
        ExpertCase("fsdp", model, options=FSDP),
        ExpertCase("fsdp, zero bubble", model, V, options=FSDP),
        ExpertCase("layers of FairScale", model, layers="fairscale"),
        *(
            ExpertCase(f"schedule of {name}", model, sizes=TENSOR, options=ZERO_0, layers=name, adapter=name, data=1)
            for name in ("megatron", "deepspeed")
        ),
        ExpertCase("sequence, ragged rows", model, sizes=SEQUENCE, kind="ragged rows", balance=ps.Balance(), data=1),
        ExpertCase("all experts on each rank", model, sizes={"pipeline": 4}, data=1),
    ]
    resumes = [
        ExpertCase("pipeline 2, expert 2", deepseek, balance=BIASES),
        ExpertCase("pipeline 2, fsdp", deepseek, sizes={"pipeline": 2}, balance=BIASES, options=FSDP),
        ExpertCase("tensor 2, expert 2", deepseek, sizes={"tensor": 2, "expert": 2}, balance=BIASES),
    ]
    judge(cases, run_ranks(train_and_resume, 4, cases, resumes, tmp_path, timeout=300))

    start = load_file(f"{deepseek}/model.safetensors")
    straight, same, *others = (
        load_file(tmp_path / n / "model.safetensors") for n in ("straight", *(c.name for c in resumes))
    )
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert (straight[bias] - start[bias]).abs().max() > 0.009, "the bias has moved"
    assert straight.keys() == start.keys()
    for name, weight in straight.items():
        assert torch.equal(weight, same[name]), name
        for other in others:
            # Adam divides small gradients by small numbers, so single elements differ more than their rounding.
            assert (other[name] - weight).norm() <= 1e-3 * (weight - start[name]).norm(), name


def test_experts_a_pipeline_and_a_third_axis(model):
    both = {"pipeline": 2, "expert": 2}
    cases = [
        ExpertCase("tensor", model, V, sizes={**both, "tensor": 2}),
        ExpertCase("sequence", model, sizes={**both, "tensor": 2, "sequence_parallel": True}),
        ExpertCase("context", model, sizes={**both, "context": 2}),
        ExpertCase("replicas of the experts", model, V, data=4),
        ExpertCase("fsdp, replicas of the experts", model, options=FSDP, data=4),
    ]
    judge(cases, run_ranks(train, 8, cases, timeout=300))


@pytest.mark.parametrize(
    ("how", "word"), [("freezes", "crashed, hung, or cannot be reached"), ("raises", "ValueError")]
)
def test_a_rank_that_fails_between_exchanges_is_named_in_all_stages(model, how, word):
    silent = () if how == "raises" else (1,)
    results = run_ranks(fails, 4, model, how, 1, TIMEOUT, silent=silent, timeout=60)
    for rank in (0, 2, 3):
        seconds, kind, message, ranks = results[rank]
        assert kind == "RankFailureError", message
        assert seconds < TIMEOUT
        assert 1 in ranks
        assert word in message
    if how == "raises":
        assert results[1][1:3] == ("ValueError", "the tokens are wrong")
