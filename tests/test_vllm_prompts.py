"""New prompts by the compiled loops, beside requests that go on by vLLM's kernel; its kernel for all is the oracle."""

import decoder
import pytest
import torch
from support.engines import engine, generated
from support.models import save_tiny
from support.oracle import assert_same_generation, greedy_transformers

import polyshard as ps
from polyshard.attention.kernels import fused
from polyshard.compiled.build import width

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(not width(), reason="no compiled loops for this processor")]

SHARED = [(3 * i + 1) % 131 for i in range(70)]
PROMPTS = [[*SHARED[: 70 - 9 * i], i + 1, 2 * i + 5] for i in range(7)] + [[5]]


def answers(directory, adapter="vllm", **options):
    """Of an engine whose requests arrive while others are being answered."""
    from vllm import SamplingParams

    ps.register_model("ServedPrompts", decoder.build_model, adapter=adapter)
    settings = [SamplingParams(temperature=0, max_tokens=3 + i, logprobs=0, ignore_eos=True) for i in range(8)]
    with engine(directory, "ServedPrompts", max_num_seqs=3, **options) as llm:
        return generated(llm.generate([{"prompt_token_ids": p} for p in PROMPTS], settings, use_tqdm=False))


@pytest.fixture
def seen(monkeypatch):
    """What the loops were given, for each call the lengths of its prompts; and where in its batch each began."""
    from polyshard.adapters.vllm import prompts

    calls, attend = [], fused.attend_into
    monkeypatch.setattr(fused, "attend_into", lambda *args: (calls.append(args[3].queries.lengths), attend(*args))[1])
    others, build = [], prompts.NewPrompts
    monkeypatch.setattr(prompts, "NewPrompts", lambda first, *rest: (others.append(first), build(first, *rest))[1])
    return calls, others


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        ("llama", {}, {"max_num_batched_tokens": 256}),
        ("llama", {}, {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "block_size": 32}),
        ("mistral", {"sliding_window": 20}, {"max_num_batched_tokens": 256}),
        ("qwen3", {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 1}, {}),
    ],
    ids=["whole", "chunks and cached prefixes", "window", "heads of 80"],
)
def test_new_prompts_beside_requests_that_go_on(tmp_path, monkeypatch, seen, kind, changes, options):
    directory = save_tiny(tmp_path / "model", kind, **{"hidden_size": 64, "head_dim": 32, **changes})
    got = answers(directory, **options)
    calls, others = seen
    assert {n for lengths in calls for n in lengths} >= {
        min(len(PROMPTS[0]), options.get("max_num_batched_tokens", 999))
    }
    assert any(first == 0 for first in others), "no batch of new prompts alone"
    assert any(first > 0 for first in others), "no batch of both kinds"

    calls.clear()
    monkeypatch.setenv("POLYSHARD_ATTENTION", "vllm")
    assert_same_generation(got, answers(directory, **options), 2e-5)
    assert not calls, "POLYSHARD_ATTENTION=vllm did not take vLLM's kernel"
    alone = greedy_transformers(directory, [PROMPTS[2]], 5)
    assert_same_generation(got[2:3], alone, 2e-5)


def test_half_precision_is_as_near_to_float32_as_by_vllms_kernel(tmp_path, monkeypatch, seen):
    directory = save_tiny(tmp_path / "model", "llama", hidden_size=64, head_dim=32)
    from polyshard.adapters.vllm.compat import has_product_of_processor

    exact = answers(directory)
    for dtype in ("bfloat16", "float16"):
        seen[0].clear()
        ours = answers(directory, dtype=dtype)
        assert bool(seen[0]) is not has_product_of_processor(getattr(torch, dtype))
        monkeypatch.setenv("POLYSHARD_ATTENTION", "vllm")
        theirs = answers(directory, dtype=dtype)
        monkeypatch.delenv("POLYSHARD_ATTENTION")
        far, too = (sum(abs(a[1][0] - b[1][0]) for a, b in zip(found, exact)) for found in (ours, theirs))
        assert far < 1.5 * too + 1e-3
