"""The same factory inside a real, unpatched vLLM, against transformers' greedy generation.

Bounds on log-probabilities: float32 rounding. They are of order 1 to 10; for the tiny models the sums behind them give
a few 1e-6, for SmolLM2 with its 30 layers up to 4e-5 (transformers itself is that far from float64).
"""

import json
from collections import Counter

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
from support.engines import engine, greedy
from support.models.experts import routers_of_transformers, save_moe
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation, greedy_transformers
from support.paths import WORKERS
from support.scripts import on_engine_ranks, run_forked
from support.workers.colocated import serve_all

import polyshard as ps
from polyshard.adapters.vllm.layers.matmul import select_matmul
from polyshard.native.matmul import PackedProduct

pytestmark = pytest.mark.vllm

TINY_BOUND, SMOLLM2_BOUND = 2e-5, 2e-4
PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), [100]]
TOKENS = 12

# Odd shapes: head dimensions that do not follow from the hidden size, one KV head, an odd vocabulary and MLP.
MODELS = {
    "llama-tied": ("llama", {"hidden_size": 96, "head_dim": 32, "tie_word_embeddings": True}),
    "llama-biased": (
        "llama",
        {"hidden_size": 72, "head_dim": 64, "intermediate_size": 100, "attention_bias": True},
    ),
    "qwen2-one-kv-head": ("qwen2", {"hidden_size": 128, "num_key_value_heads": 1, "intermediate_size": 90}),
    "small-heads": ("llama", {"hidden_size": 48, "head_dim": 12}),  # vLLM's own model cannot be served with these
    "qwen3": ("qwen3", {"hidden_size": 80, "head_dim": 32, "num_attention_heads": 6, "vocab_size": 149}),
}


LIBRARIES = [name for name in ps.adapter_names() if name not in ("torch", "vllm")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    directories = {name: save_tiny(folder / name, kind, **changes) for name, (kind, changes) in MODELS.items()}
    return {name: (path, greedy_transformers(path, PROMPTS, TOKENS)) for name, path in directories.items()}


@pytest.mark.parametrize("adapter", ["vllm", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_equals_transformers(models, name, adapter):
    directory, expected = models[name]
    ps.register_model(f"Served{adapter}", decoder.build_model, adapter=adapter)
    with engine(directory, f"Served{adapter}") as llm:
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), expected, TINY_BOUND)


@pytest.mark.parametrize("adapter", LIBRARIES)
def test_the_layers_of_every_library_serve(models, adapter):
    directory, expected = models["qwen2-one-kv-head"]
    ps.register_model(f"Served{adapter}", decoder.build_model, adapter=adapter)
    with engine(directory, f"Served{adapter}") as llm:
        assert_same_generation(greedy(llm, PROMPTS, TOKENS), expected, TINY_BOUND)
        if select_matmul(torch.float32) == "native":
            assert_taken_inside_the_product(llm)


@pytest.mark.skipif(select_matmul(torch.float32) != "native", reason="vLLM's product is taken here")
@pytest.mark.parametrize("adapter", ["vllm", "torch"])
def test_activation_and_residuals_are_taken_inside_the_product_with_the_same_bits(models, adapter):
    ps.register_model("Fused", decoder.build_model, adapter=adapter)
    with engine(models["llama-biased"][0], "Fused") as llm:
        assert_taken_inside_the_product(llm)


def assert_taken_inside_the_product(llm):
    calls, gated, added = Counter(), PackedProduct.swiglu, PackedProduct.added_to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedProduct, "swiglu", lambda self, *x: (calls.update(["gated"]), gated(self, *x))[1])
        patch.setattr(PackedProduct, "added_to", lambda self, *x: (calls.update(["added"]), added(self, *x))[1])
        inside = greedy(llm, PROMPTS, TOKENS)
        assert calls["added"] == 2 * calls["gated"] > 0  # of attention, and of the MLP
        patch.setattr(PackedProduct, "swiglu", lambda self, *x: ps.swiglu(self(*x)))
        patch.setattr(PackedProduct, "added_to", lambda self, residual, *x: residual + self(*x))
        assert greedy(llm, PROMPTS, TOKENS) == inside


def test_smollm2_equals_transformers(smollm2):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    prompt = prompt if isinstance(prompt, list) else prompt["input_ids"]
    expected = greedy_transformers(smollm2, [prompt], 16)
    ps.register_model("ServedSmol", decoder.build_model)
    with engine(smollm2, "ServedSmol") as llm:
        assert_same_generation(greedy(llm, [prompt], 16), expected, SMOLLM2_BOUND)
    assert "Paris" in tokenizer.decode(expected[0][0])


def test_smollm2_is_refused_at_tensor_parallel_2(smollm2):
    with pytest.raises(ValueError, match=r"9.*divisible.*2"), engine(smollm2, tensor_parallel_size=2):
        pass


def test_tensor_parallel_2_on_the_layers_of_every_library(models):
    names_of = {adapter: ["qwen2-one-kv-head"] for adapter in LIBRARIES}
    names_of |= {adapter: ["llama-tied", "qwen2-one-kv-head", "qwen3"] for adapter in ("vllm", "torch")}
    served = [(adapter, name) for adapter, names in names_of.items() for name in names]
    asked = [(adapter, models[name][0], "decoder:build_model") for adapter, name in served]
    results = on_engine_ranks(serve_all, 2, asked, PROMPTS, TOKENS)[0]
    for (_, name), result in zip(served, results, strict=True):
        assert_same_generation(result, models[name][1], TINY_BOUND)


def test_a_factory_of_a_script_reaches_spawned_workers_at_tensor_parallel_2(models):
    directory, expected = models["llama-tied"]
    arguments = [str(directory), "2", "vllm", json.dumps(PROMPTS), str(TOKENS)]
    result = run_forked(WORKERS / "serving_script.py", *arguments, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert_same_generation(result, expected, TINY_BOUND)


# vLLM 0.32 on CPU makes the buffers between stages only in the run that compiles, its own models' too.
STAGES = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}


def test_pipeline_parallel_2_with_tied_weights_and_the_experts_of_all_stages(tmp_path):
    directory = save_moe(tmp_path / "model", "qwen3_moe", head_dim=32, tie_word_embeddings=True)
    options = {**STAGES, "factory": "support.workers.experts:tied", "worker_extension_cls": ps.ROUTING_WORKER}
    arguments = [str(directory), "1", "torch", json.dumps(PROMPTS), str(TOKENS), json.dumps(options)]
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TORCH_COMPILE_DISABLE": "0"}
    result = run_forked(WORKERS / "serving_script.py", *arguments, **settings)
    assert_same_generation(result["generated"], greedy_transformers(directory, PROMPTS, TOKENS), TINY_BOUND)
    for prompt, (tokens, _), experts in zip(PROMPTS, result["generated"], result["routing"], strict=True):
        expected = routers_of_transformers(directory, [*prompt, *tokens])
        assert list(experts) == [f"model.layers.{layer}.mlp" for layer in range(len(expected))]
        for layer, chosen in zip(experts.values(), expected, strict=True):
            assert torch.equal(torch.tensor(layer).sort(-1).values, chosen)
