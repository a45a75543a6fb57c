"""The pipelines of Megatron-Core and DeepSpeed train to the weights of one process, beside every other axis."""

import pytest
from support.models.experts import save_moe
from support.models.tiny import VOCAB, save_tiny
from support.oracles.expert_pipelines import judge as judge_experts
from support.oracles.pipeline_training import judge
from support.workers.expert_pipelines import ExpertCase, train_all
from support.workers.library_pipelines import LibraryCase, groups_of_engines
from support.workers.pipelines import train

from polyshard.testing import run_ranks

ZERO_0 = {"zero_stage": 0}
CLIPPED = {"max_grad_norm": 0.5}
OVERLAP = {"ddp_options": {"overlap_grad_reduce": True, "bucket_size": 4096}}
INTERLEAVED = "interleaved-1f1b"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "tied"
    return str(save_tiny(folder, "llama", tie_word_embeddings=True, num_hidden_layers=4))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("pipelines") / "untied", "qwen3", num_hidden_layers=4))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "experts"
    return str(save_moe(folder, "qwen3_moe", vocab_size=VOCAB))


def test_two_ranks(tied, untied, experts):
    """Balance losses of experts train in stages without a loss, too."""

    def case(*args, **fields):
        return LibraryCase.of(*args, **fields)

    cases = [
        case("megatron", "1f1b, no optimizer shards", untied, options=ZERO_0),
        case("megatron", "interleaved, tied", tied, INTERLEAVED, kind="steps of unequal lengths"),
        case("megatron", "uneven lengths, uneven stages", tied, kind="uneven", plan={"layers": (1, 3)}),
        case("megatron", "uneven lengths, interleaved", tied, INTERLEAVED, kind="uneven", options=ZERO_0),
        case("megatron", "ragged rows, the factory's own stage", tied, kind="ragged rows", built=False),
        case("megatron", "recompute", tied, options={"recompute": "full", **ZERO_0}),
        case("deepspeed", "zero 0", untied, options=ZERO_0),
        case("deepspeed", "zero 1, tied", tied, options=CLIPPED),
        case("deepspeed", "unequal steps", tied, options=ZERO_0, kind="steps of unequal lengths"),
        case("deepspeed", "uneven lengths, uneven stages", tied, kind="uneven", plan={"layers": (1, 3)}),
        case("deepspeed", "ragged rows, the factory's own stage", tied, kind="ragged rows", built=False),
        case("deepspeed", "recompute", tied, options={"recompute": "full", **ZERO_0}),
    ]
    one = {"pipeline": 2}
    banks = [
        ExpertCase(name, experts, sizes=one, options=ZERO_0, layers=name, adapter=name, data=1)
        for name in ("megatron", "deepspeed")
    ]
    outcome = run_ranks(train_all, 2, cases, banks, timeout=300)
    judge(cases, [results for results, _ in outcome])
    judge_experts(banks, [results for _, results in outcome])


def test_each_pair_of_axes(tied, untied):
    def case(*args, **fields):
        return LibraryCase.of(*args, **fields)

    tensor, context = {"pipeline": 2, "tensor": 2}, {"pipeline": 2, "context": 2}
    sequence = {**tensor, "sequence_parallel": True}
    cases = [
        case("megatron", "four stages", tied, sizes={"pipeline": 4}, options=ZERO_0),
        case("megatron", "data, optimizer shards, tied", tied, options=CLIPPED),
        case("megatron", "data, overlapped, interleaved", untied, INTERLEAVED, options=OVERLAP),
        case("megatron", "data, no optimizer shards", tied, options={**ZERO_0, **CLIPPED}),
        case("megatron", "tensor, optimizer shards", tied, sizes=tensor),
        case("megatron", "sequence, interleaved", tied, INTERLEAVED, sizes=sequence, options=ZERO_0),
        case("megatron", "sequence, ragged rows", tied, sizes=sequence, options=ZERO_0, kind="ragged rows"),
        case("megatron", "context", tied, sizes=context),
        case("deepspeed", "four stages", tied, sizes={"pipeline": 4}, options=ZERO_0),
        case("deepspeed", "data, zero 1, tied", tied),
        case("deepspeed", "data, zero 0", tied, options={**ZERO_0, **CLIPPED}),
        case("deepspeed", "tensor, zero 1", tied, sizes=tensor),
        case("deepspeed", "tensor, zero 0, uneven lengths", tied, sizes=tensor, options=ZERO_0, kind="uneven"),
        case("deepspeed", "context, zero 1", tied, sizes=context),
    ]
    judge(cases, run_ranks(train, 4, cases, timeout=300))


def test_three_axes(tied):
    def case(*args, **fields):
        return LibraryCase.of(*args, **fields)

    both = {"pipeline": 2, "tensor": 2}
    cases = [
        case("megatron", "data, tensor, interleaved", tied, INTERLEAVED, sizes=both),
        # Without a bucket of their own, the copies of the embedding would be cut at other elements in each stage.
        case("megatron", "four replicas, uneven stages", tied, plan={"layers": (1, 3)}),
        case("megatron", "tensor, context", tied, sizes={**both, "context": 2}, options=ZERO_0),
        case("deepspeed", "data, tensor", tied, sizes=both),
        case("deepspeed", "tensor, context", tied, sizes={**both, "context": 2}, options=ZERO_0),
    ]
    judge(cases, run_ranks(train, 8, cases, timeout=300))


def test_engines_that_are_built_one_after_the_other_do_not_wait_for_ranks_of_destroyed_groups():
    """torch names groups after their ranks and number: the name of an existing or a destroyed group may come again."""
    assert run_ranks(groups_of_engines, 2, 20, timeout=120) == [[2.0] * 20] * 2
