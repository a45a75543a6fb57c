"""What vLLM's engine offers, on a registered model; the oracle is vLLM's own implementation on the same engine."""

import json

import decoder
import pytest
import torch
from support.engines import engine, generated
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation, greedy_transformers
from support.paths import WORKERS
from support.scripts import run_forked

import polyshard as ps

pytestmark = pytest.mark.vllm

BOUND = 2e-5
SHARED = [(3 * i + 1) % 131 for i in range(96)]
MIXED = [[*SHARED[: 96 - 7 * i], i + 1, 2 * i + 5] for i in range(12)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("features") / "model", "qwen3", hidden_size=96, head_dim=32)


def on_both(directory, scenario, **options):
    """The scenario's results on a registered model, and on vLLM's own."""
    ps.register_model("ServedFeatures", decoder.build_model)
    results = []
    for architecture in ("ServedFeatures", None):
        with engine(directory, architecture, **options) as llm:
            results.append(scenario(llm))
    return results


def test_prompts_in_chunks_cached_prefixes_and_mixed_lengths(directory):
    from vllm import SamplingParams

    def scenario(llm):
        parameters = [SamplingParams(temperature=0, max_tokens=2 + i, logprobs=0, ignore_eos=True) for i in range(12)]
        prompts = [{"prompt_token_ids": ids} for ids in MIXED]
        first = llm.generate(prompts, parameters, use_tqdm=False)
        again = llm.generate(prompts, parameters, use_tqdm=False)
        return generated(first), generated(again), sum(output.num_cached_tokens for output in again)

    options = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "enable_prefix_caching": True, "block_size": 32}
    (first, again, cached), (want_first, want_again, want_cached) = on_both(directory, scenario, **options)
    assert_same_generation(first, want_first, BOUND)
    assert_same_generation(again, want_again, BOUND)
    assert cached == want_cached > 0
    alone = greedy_transformers(directory, [MIXED[3]], 5)
    assert_same_generation(first[3:4], alone, BOUND)


def test_several_samples_by_seed_and_log_probabilities_of_prompts(directory):
    from vllm import SamplingParams

    def scenario(llm):
        parameters = SamplingParams(
            n=3, seed=7, temperature=0.8, top_p=0.9, max_tokens=8, logprobs=2, prompt_logprobs=2
        )
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in MIXED[:3]], parameters, use_tqdm=False)
        prompts = [[max(v.logprob for v in step.values()) for step in o.prompt_logprobs[1:]] for o in outputs]
        return generated(outputs), prompts

    (samples, prompts), (want_samples, want_prompts) = on_both(directory, scenario)
    assert len(samples) == 9
    assert len({tuple(ids) for ids, _ in samples}) > 3
    assert_same_generation(samples, want_samples, BOUND)
    for got, want in zip(prompts, want_prompts, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=0, atol=BOUND)


def test_half_precision_is_as_near_to_float32_as_vllms_own(directory):
    from vllm import SamplingParams

    def scenario(llm):
        parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in MIXED], parameters, use_tqdm=False)
        pairs = [(step[i].logprob) for o, ids in zip(outputs, MIXED) for step, i in zip(o.prompt_logprobs[1:], ids[1:])]
        return torch.tensor(pairs)

    with engine(directory) as llm:
        exact = scenario(llm)
    for dtype in ("bfloat16", "float16"):
        ours, theirs = ((found - exact).abs().mean() for found in on_both(directory, scenario, dtype=dtype))
        assert 0 < ours < 1.25 * theirs


def test_structured_output(smollm2):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    def scenario(llm):
        wanted = StructuredOutputsParams(regex=r"(red|green|blue), [1-9][0-9]{2}")
        parameters = SamplingParams(temperature=0, max_tokens=12, structured_outputs=wanted)
        return [o.outputs[0].text for o in llm.generate(["A colour and a number:"], parameters, use_tqdm=False)]

    got, want = on_both(smollm2, scenario, skip_tokenizer_init=False)
    assert got == want
    assert got[0].split(", ")[0] in ("red", "green", "blue")


def test_an_engine_that_slept_answers_as_before(directory):
    """On CPU vLLM's worker keeps its memory; the engine around it drops its prefix cache and takes no requests."""
    from vllm import SamplingParams

    def scenario(llm):
        parameters = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)
        answers = []
        for level in (None, 1, 2):
            if level is not None:
                llm.sleep(level=level)
                assert llm.llm_engine.is_sleeping()
                llm.wake_up()
            assert not llm.llm_engine.is_sleeping()
            prompts = [{"prompt_token_ids": ids} for ids in MIXED[:2]]
            answers.append(generated(llm.generate(prompts, parameters, use_tqdm=False)))
        return answers

    ours, theirs = on_both(directory, scenario, enable_prefix_caching=True)
    for mine, native in zip(ours, theirs):
        assert_same_generation(mine, native, BOUND)


def test_speculation_by_n_grams_changes_no_token(directory):
    # In a process of its own: it imports numba, after which no other engine on CPU starts.
    prompts = [[5, 6, 7, 8] * 6, [9, 10, 11] * 5]
    options = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
    arguments = [str(directory), "1", "vllm", json.dumps(prompts), "12", json.dumps(options)]
    result = run_forked(WORKERS / "serving_script.py", *arguments, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert_same_generation(result, greedy_transformers(directory, prompts, 12), BOUND)


def test_heads_whose_rotary_dimension_is_no_whole_vector(tmp_path):
    """vLLM's rotary operator on CPU writes past the end of such, in bfloat16 to a crash."""
    small = save_tiny(tmp_path / "model", "llama", hidden_size=80, head_dim=20)
    (ids, exact), *_ = greedy_transformers(small, [MIXED[0]], 1)
    ps.register_model("ServedFeatures", decoder.build_model)
    from vllm import SamplingParams

    with engine(small, "ServedFeatures", dtype="bfloat16") as llm:
        parameters = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
        output = llm.generate([{"prompt_token_ids": MIXED[0]}] * 3, parameters, use_tqdm=False)[0]
    assert abs(output.outputs[0].logprobs[0][ids[0]].logprob - exact[0]) < 0.1
