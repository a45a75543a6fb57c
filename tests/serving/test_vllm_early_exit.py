"""What follows the last attention is computed for sampled tokens alone; the oracle is transformers."""

import decoder
import pytest
import torch
from support.engines import engine, greedy
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation, greedy_transformers

import polyshard as ps

pytestmark = pytest.mark.vllm

PROMPTS = [[(7 * i + j) % 131 for j in range(5 + 11 * i)] for i in range(5)]
BOUND = 2e-5


class Unfinishable(decoder.Decoder):
    """Its forward can be asked for less, but nothing does the rest."""

    finish = None


class Whole(decoder.Decoder):
    """Gives logits, of all tokens."""

    def forward(self, input_ids, positions, finish=True):
        return self.compute_logits(super().forward(input_ids, positions, finish=finish))


def build_whole(config, parallel_context):
    return Whole(decoder.DecoderConfig.of(config), parallel_context)


def build_unfinishable(config, parallel_context):
    return Unfinishable(decoder.DecoderConfig.of(config), parallel_context)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("finish") / "model", "qwen3", hidden_size=96, head_dim=32)


@pytest.fixture(autouse=True)
def registered():
    ps.register_model("ServedFinish", decoder.build_model)


def rows_of_mlps(llm):
    """A list for each layer of the served decoder, to which each step adds the rows that its MLP is given."""
    from polyshard.adapters.vllm.compat import local_worker

    layers = list(local_worker(llm).model.model.model.layers)
    rows = [[] for _ in layers]
    for layer, seen in zip(layers, rows):
        layer.mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[0]))
    return rows


def test_the_last_mlp_is_given_the_sampled_tokens(directory):
    expected = greedy_transformers(directory, PROMPTS, 4)
    with engine(directory, "ServedFinish") as llm:
        rows = rows_of_mlps(llm)
        assert_same_generation(greedy(llm, PROMPTS, 4), expected, BOUND)
    *before, last = rows
    assert all(layer[0] == sum(map(len, PROMPTS)) for layer in before)
    assert last == [len(PROMPTS)] * 4


def test_log_probabilities_of_prompts_are_of_finished_states(directory):
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with engine(directory, "ServedFinish") as llm:
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], parameters, use_tqdm=False)
    for output, prompt in zip(outputs, PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found = [step[i].logprob for step, i in zip(output.prompt_logprobs[1:], prompt[1:])]
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=BOUND)


def test_recorded_and_adapted_models_are_finished_at_once(directory, tmp_path, monkeypatch):
    """A recording compares all tokens of all modules; LoRA adapters are chosen for all tokens of a batch in order."""
    expected = greedy_transformers(directory, PROMPTS, 1)
    tokens = sum(map(len, PROMPTS))
    with engine(directory, "ServedFinish", enable_lora=True, max_lora_rank=8) as llm:
        rows = rows_of_mlps(llm)
        assert_same_generation(greedy(llm, PROMPTS, 1), expected, BOUND)
        assert [layer[0] for layer in rows] == [tokens] * len(rows)
    monkeypatch.setenv("POLYSHARD_TRACE", str(tmp_path / "trace"))
    with engine(directory, "ServedFinish") as llm:
        rows = rows_of_mlps(llm)
        assert_same_generation(greedy(llm, PROMPTS, 1), expected, BOUND)
        assert [layer[0] for layer in rows] == [tokens] * len(rows)


def test_logits_are_of_finished_states(directory):
    ps.register_model("ServedWhole", build_whole, outputs="logits")
    with engine(directory, "ServedWhole") as llm:
        assert_same_generation(greedy(llm, PROMPTS, 4), greedy_transformers(directory, PROMPTS, 4), BOUND)


def test_a_forward_that_nothing_finishes_is_refused(directory):
    ps.register_model("ServedUnfinished", build_unfinishable)
    with (
        pytest.raises(Exception, match=r"missing a method finish\(x\)"),
        engine(directory, "ServedUnfinished"),
    ):
        pass
