"""An engine's attention by the compiled loops over vLLM's cache; vLLM's kernel is the oracle."""

import decoder
import pytest
import torch
from support.engines import engine, generated
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation, greedy_transformers

import polyshard as ps
from polyshard.attention.kernels.cpu import native_paged as paged
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.attention.packing import of_lengths
from polyshard.core.attention import AttentionSpec
from polyshard.native.build import width

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
    """What the loops were given: for each call queries and keys of its requests."""
    calls, attend = [], paged.attend

    def watched(q, pages, requests, *rest):
        calls.append((requests.bounds.diff().tolist(), requests.seen.tolist()))
        attend(q, pages, requests, *rest)

    monkeypatch.setattr(paged, "attend", watched)
    return calls


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
def test_requests_of_every_kind(tmp_path, monkeypatch, seen, kind, changes, options):
    directory = save_tiny(tmp_path / "model", kind, **{"hidden_size": 64, "head_dim": 32, **changes})
    got = answers(directory, **options)
    kinds = [{_kind(*request) for request in zip(*call)} for call in seen]
    assert {"new", "decoding"} in kinds, "no batch of both kinds"
    chunked = options.get("max_num_batched_tokens", 999) < len(PROMPTS[0])
    assert any("later chunk" in found for found in kinds) == chunked

    seen.clear()
    monkeypatch.setenv("POLYSHARD_ATTENTION", "vllm")
    assert_same_generation(got, answers(directory, **options), 2e-5)
    assert not seen, "POLYSHARD_ATTENTION=vllm did not take vLLM's kernel"
    alone = greedy_transformers(directory, [PROMPTS[2]], 5)
    assert_same_generation(got[2:3], alone, 2e-5)


def _kind(queries, keys):
    return "new" if queries == keys else "decoding" if queries == 1 else "later chunk"


def test_a_cache_of_another_form_is_read_by_vllms_kernel(tmp_path, monkeypatch, seen):
    from polyshard.adapters.vllm.attention import native as compiled_attention

    directory = save_tiny(tmp_path / "model", "llama", hidden_size=64, head_dim=32)
    got = answers(directory)
    assert seen
    seen.clear()
    monkeypatch.setattr(compiled_attention, "keeps_keys_transposed", lambda *args: False)
    assert_same_generation(got, answers(directory), 2e-5)
    assert not seen


def test_a_layer_with_dropout_is_served_as_one_without():
    from polyshard.adapters.vllm.attention.native import supports
    from polyshard.adapters.vllm.compat import has_vllm_only_instructions

    for dtype in (torch.float32, torch.bfloat16):
        spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125, dropout=0.1)
        assert supports(spec, 64, dtype) is not has_vllm_only_instructions(dtype)


def test_how_pages_lie_is_looked_at():
    """True of all instruction sets but AMX's."""
    from polyshard.adapters.vllm import compat

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (64, 80):
            isa = compat.cpu_isa(dtype, head_dim)
            assert compat.keeps_keys_transposed(isa, dtype, 128, head_dim) is (isa != "amx")


def test_half_precision(tmp_path, monkeypatch, seen):
    from polyshard.adapters.vllm.compat import has_vllm_only_instructions

    directory = save_tiny(tmp_path / "model", "llama", hidden_size=64, head_dim=32)
    exact = answers(directory)
    for dtype in ("bfloat16", "float16"):
        seen.clear()
        got = answers(directory, dtype=dtype)
        assert bool(seen) is not has_vllm_only_instructions(getattr(torch, dtype))
        first = [(ours[1][0], wanted[1][0]) for ours, wanted in zip(got, exact)]
        torch.testing.assert_close(*map(torch.tensor, zip(*first)), atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_are_no_further_from_float64_than_those_of_vllms_kernel(dtype):
    from polyshard.adapters.vllm import compat
    from polyshard.adapters.vllm.compat import paging

    torch.manual_seed(0)
    keys, spec = 300, AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=64, scale=0.125)
    q, k, v = (torch.randn(keys, heads, 64).to(dtype) for heads in (6, 2, 2))
    sequences = of_lengths([keys], q.device)
    theirs = compat.cpu_attention(q, k, v, AttentionCall(spec=spec, queries=sequences, keys=sequences))

    at_keys, at_values, table = paging.page_keys_values(k, v, sequences.host, 32)
    at_keys, at_values = at_keys.permute(0, 2, 3, 1).contiguous(), at_values.transpose(1, 2).contiguous()
    ours, requests = torch.empty_like(q), paged.Requests(sequences.host, sequences.host[1:], table)
    paged.attend(q, paged.Pages(at_keys, at_values, spec), requests, ours)

    q, k, v = (t.double().transpose(0, 1)[None] for t in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    far, too = ((out.double() - exact[0].transpose(0, 1)).abs().mean() for out in (ours, theirs))
    assert far < 1.001 * too
