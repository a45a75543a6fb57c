"""Experts inside pipeline stages train to the weights of one process, beside every other axis."""

import pytest
from safetensors.torch import load_file
from support.models.experts import save_moe
from support.models.tiny import VOCAB
from support.oracles.expert_pipelines import judge
from support.workers.expert_pipelines import ExpertCase, freezes, replayed, train_and_refuse, train_resume_and_replay

import polyshard as ps
from polyshard.testing import run_ranks

TIMEOUT = 4.5
FSDP = {"data_parallel": "fsdp"}
SEQUENCE = {"pipeline": 2, "tensor": 2, "sequence_parallel": True}
BOTH = {"pipeline": 2, "expert": 2}
REFUSED = {  # of replayed experts: a micro-batch, a token, a layer and a rank that lack; with and without a pipeline
    True: (
        "wrong number of micro-batches: got 1, expected 2",
        "of model.layers.3.mlp in micro-batch 1 have the wrong shape: got (30, 2), expected (32, 2)",
        "unexpected ['model.layers.9.mlp'], which no pipeline stage has",
        "experts are replayed on some ranks of a pipeline only: not on",
    ),
    False: (
        "wrong number of micro-batches: got 1, expected 2",
        "wrong shape: got (30, 2), expected (32, 2)",
        "unexpected ['model.layers.9.mlp']",
    ),
}
KINDS = ("rows", "ragged rows")
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


def replaying(model):
    """Runs that record and replay experts, most of them with recomputation."""
    full = {"recompute": "full"}
    megatron = {"adapter": "megatron", "layers": "megatron"}
    cases = {
        "accumulation": {"sizes": {"tensor": 2, "expert": 2, "sequence_parallel": True}, "checks": True},
        "1f1b": {"sizes": BOTH, "checks": True},
        "padded": {"plan": V, "sizes": BOTH, "kind": "ragged rows"},
        "padded shards": {"sizes": SEQUENCE, "kind": "ragged rows"},
        "context": {"sizes": {"pipeline": 2, "context": 2}},
        "Megatron, torch's checkpoints": {**megatron, "options": {"zero_stage": 0}, "checkpoints": True},
        "DeepSpeed": {"sizes": {"pipeline": 2}, "adapter": "deepspeed", "layers": "deepspeed"},
    }
    return [ExpertCase(name, model, **{"options": full, "balance": ps.Balance(), **c}) for name, c in cases.items()]


def judge_replays(cases, results):
    """Assert that each case has taken the given experts, and trained to the weights of one process."""
    one = [ExpertCase(kind, cases[0].directory, sizes={}, kind=kind, balance=ps.Balance()) for kind in KINDS]
    references = replayed(one)
    for case in cases:
        _, expected, weights, _, _ = references[case.kind]
        held = set()
        for result in results:
            same_bits, loss, got, taken, told = result[case.name]
            assert same_bits, case.name
            assert taken, case.name
            assert loss == pytest.approx(expected, rel=2e-6), case.name
            for name, weight in got.items():
                gap = float((weight - weights[name]).abs().max())
                assert gap < 1e-5, f"{case.name}: {name} by {gap}"
            for text, wanted in zip(told, REFUSED["pipeline" in case.sizes], strict=False):
                assert wanted in text, case.name
            held |= got.keys()
        assert held == weights.keys(), case.name


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
    replays = replaying(model)
    outcome = run_ranks(train_resume_and_replay, 4, cases, resumes, tmp_path, replays, timeout=300)
    judge(cases, [trained for trained, _ in outcome])
    judge_replays(replays, [replayed for _, replayed in outcome])

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
    cases = [
        ExpertCase("sequence", model, sizes={**BOTH, "tensor": 2, "sequence_parallel": True}),
        # Context-parallel ranks hold the same experts.
        ExpertCase("context, zero bubble", model, V, sizes={**BOTH, "context": 2}),
        ExpertCase("context, fsdp", model, sizes={**BOTH, "context": 2}, options=FSDP),
        deepspeed("context, DeepSpeed", model, sizes={**BOTH, "context": 2}),
        deepspeed("DeepSpeed, a stage without experts", model, sizes={"pipeline": 4, "expert": 2}, kind="uneven"),
    ]
    refused = [
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
