"""torch.compile of registered models, as vLLM compiles its own; the oracle is transformers."""

import json

import pytest
from support.models.experts import save_moe
from support.models.tiny import save_tiny, tiny_config, tiny_model
from support.oracles.greedy import assert_same_generation, greedy_transformers
from support.paths import WORKERS
from support.scripts import run_forked

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40))]
TOKENS, BOUND = 6, 2e-5


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("compiled")
    old = save_tiny(scratch / "old", "llama", hidden_size=96, head_dim=32)
    tiny_model(tiny_config("llama", hidden_size=96, head_dim=32), seed=1).save_pretrained(new := scratch / "new")
    experts = save_moe(scratch / "experts", "qwen3_moe", head_dim=32)
    arguments = [str(old), str(new), str(experts), json.dumps(PROMPTS), str(TOKENS)]
    result = run_forked(WORKERS / "compiled_script.py", *arguments, TORCH_COMPILE_DISABLE="0")
    return result, *(greedy_transformers(directory, PROMPTS, TOKENS) for directory in (old, new, experts))


@pytest.mark.parametrize("name", ["vllm", "transformers", "torch", "megatron"])
def test_each_registration_is_compiled_for_itself(outcome, name):
    results, before, *_ = outcome
    assert_same_generation(results[name]["first"], before, BOUND)
    assert (results[name]["graphs"] > 0) == (name != "megatron")  # whose layers are not taken
    assert results[name]["seen"] == (name != "megatron")


@pytest.mark.parametrize("name", ["vllm", "transformers", "torch", "megatron"])
def test_live_weights_reach_a_compiled_engine(outcome, name):
    results, before, after, _ = outcome
    assert before != after
    assert_same_generation(results[name]["synced"], after, BOUND)


def test_a_forward_that_is_no_one_graph_is_refused_with_the_way_out(outcome):
    message = outcome[0]["breaks"]
    assert "cannot trace" in message
    assert "enforce_eager=True" in message


def test_experts_are_compiled_and_their_choices_returned(outcome):
    results, *_, expected = outcome
    assert results["experts"]["seen"]
    assert_same_generation(results["experts"]["first"], expected, BOUND)
    for prompt, layers in zip(PROMPTS, results["experts"]["routing"], strict=True):
        assert [(len(rows), len(set(rows[0]))) for rows in layers] == [(len(prompt) + TOKENS - 1, 2)] * 2
