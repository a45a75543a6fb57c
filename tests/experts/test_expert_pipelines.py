"""Experts inside pipeline stages train to the weights of one process, beside every other axis."""

import pytest
from safetensors.torch import load_file
from support.models.experts import save_moe
from support.models.tiny import VOCAB
from support.oracles.expert_pipelines import judge
from support.workers.expert_pipelines import ExpertCase, freezes, train_and_refuse, train_and_resume

import polyshard as ps
from polyshard.testing import run_ranks

TIMEOUT = 4.5
FSDP = {"data_parallel": "fsdp"}
SEQUENCE = {"pipeline": 2, "tensor": 2, "sequence_parallel": True}
V = {"schedule": "zero-bubble-v"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "qwen3_moe"
    return str(save_moe(folder, "qwen3_moe", vocab_size=VOCAB, num_hidden_layers=4, mlp_only_layers=[1]))


def deepspeed(*args, **fields):
    return ExpertCase(*args, adapter="deepspeed", layers="deepspeed", **fields)


BIASES = ps.Balance(sequence=0.01, z=0.001, bias_rate=0.01)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return str(save_moe(tmp_path_factory.mktemp("experts") / "deepseek_v3", "deepseek_v3", vocab_size=VOCAB))


def test_experts_and_a_pipeline(model, deepseek, tmp_path):
    cases = [
        ExpertCase("1f1b", model),
        ExpertCase("interleaved, uneven lengths", model, {"schedule": "interleaved-1f1b"}, kind="uneven"),
        ExpertCase("zero bubble, ragged rows", model, V, kind="ragged rows", options={"recompute": "full"}),
        ExpertCase("fsdp", model, options=FSDP),
        ExpertCase("fsdp, dualpipe", model, {"schedule": "dualpipe-v"}, options=FSDP),
        ExpertCase("layers of FairScale", model, layers="fairscale"),
        ExpertCase("FairScale", model, adapter="fairscale", layers="fairscale", options={"zero_stage": 1}),
        ExpertCase("Megatron", model, adapter="megatron", layers="megatron", options={"zero_stage": 0}),
        deepspeed("DeepSpeed", model, options={"zero_stage": 0}),
        ExpertCase("sequence, ragged rows", model, sizes=SEQUENCE, kind="ragged rows", balance=ps.Balance(), data=1),
        ExpertCase("all experts on each rank", model, sizes={"pipeline": 4}, data=1),
    ]
    resumes = [
        ExpertCase("pipeline 2, expert 2", deepseek, balance=BIASES),  # saves the state
        ExpertCase("pipeline 2, fsdp", deepseek, sizes={"pipeline": 2}, balance=BIASES, options=FSDP),
        ExpertCase(
            "Megatron", deepseek, adapter="megatron", layers="megatron", options={"zero_stage": 1}, balance=BIASES
        ),
        deepspeed("DeepSpeed", deepseek, balance=BIASES),
        ExpertCase("tensor 2, expert 2", deepseek, sizes={"tensor": 2, "expert": 2}, balance=BIASES),
    ]
    judge(cases, run_ranks(train_and_resume, 4, cases, resumes, tmp_path, timeout=300))

    start = load_file(f"{deepseek}/model.safetensors")
    straight, *others = (load_file(tmp_path / case.name / "model.safetensors") for case in resumes)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert (straight[bias] - start[bias]).abs().max() > 0.009, "the bias has moved"
    assert straight.keys() == start.keys()
    for name, weight in straight.items():
        for other in others:
            # Adam divides small gradients by small numbers, so single elements differ more than their rounding.
            assert (other[name] - weight).norm() <= 1e-3 * (weight - start[name]).norm(), name


def test_experts_a_pipeline_and_a_third_axis(model):
    both = {"pipeline": 2, "expert": 2}
    cases = [
        ExpertCase("sequence", model, sizes={**both, "tensor": 2, "sequence_parallel": True}),
        # Context-parallel ranks hold the same experts.
        ExpertCase("context, zero bubble", model, V, sizes={**both, "context": 2}),
        ExpertCase("context, fsdp", model, sizes={**both, "context": 2}, options=FSDP),
        deepspeed("context, DeepSpeed", model, sizes={**both, "context": 2}),
        deepspeed("DeepSpeed, a stage without experts", model, sizes={"pipeline": 4, "expert": 2}, kind="uneven"),
    ]
    refused = [
        (ExpertCase("record", model, sizes=SEQUENCE), "unsupported for several micro-batches of a pipeline: got 2"),
        (ExpertCase("lengths", model, sizes=SEQUENCE, kind="ragged rows"), "expected one shape for balance losses"),
        (ExpertCase("fsdp", model, V, options=FSDP), "FSDP2 cannot shard experts with zero-bubble-v"),
    ]
    outcome = run_ranks(train_and_refuse, 8, cases, [case for case, _ in refused], timeout=300)
    judge(cases, [results for results, _ in outcome])
    for _, told in outcome:
        for case, text in refused:
            assert text in told[case.name], case.name


def test_a_rank_that_freezes_between_exchanges_is_named_in_all_stages(model):
    results = run_ranks(freezes, 4, model, 1, TIMEOUT, silent=(1,), timeout=60)
    for rank in (0, 2, 3):
        seconds, kind, message, ranks = results[rank]
        assert kind == "RankFailureError", message
        assert seconds < TIMEOUT
        assert 1 in ranks
        assert "crashed, hung, or cannot be reached" in message
