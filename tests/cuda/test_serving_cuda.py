"""Serving on CUDA: sleep and wake, CUDA graphs, vLLM's latent cache. Not yet run: docs/how-to/gpu.md."""

import decoder
import pytest
import torch
from support.engines import engine, greedy
from support.models import latent
from support.models.tiny import save_tiny
from support.oracles.greedy import assert_same_generation

import polyshard as ps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40))]
TOKENS = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("cuda") / "model", "qwen3", hidden_size=256, head_dim=64)


@pytest.mark.parametrize("adapter", ["vllm", "torch"])
@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_answers_as_before(directory, adapter, level):
    ps.register_model("ServedCuda", decoder.build_model, adapter=adapter)
    context = ps.initialize("torch")
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    model.to(torch.bfloat16)
    with engine(directory, "ServedCuda", dtype="bfloat16", enable_sleep_mode=True) as llm:
        before = greedy(llm, PROMPTS, TOKENS)
        llm.sleep(level=level)
        llm.wake_up()
        if level == 2:  # the weights are gone
            ps.WeightSync(model, context, llm, share=False)()
        assert greedy(llm, PROMPTS, TOKENS) == before


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("runner", ["1", "0"], ids=["V2 runner", "V1 runner"])
@pytest.mark.parametrize("adapter", ps.adapter_names())
def test_cuda_graphs_change_no_token(directory, adapter, runner, monkeypatch):
    """Layers that torch.compile does not take are captured whole, when decoding."""
    from vllm.compilation.counter import compilation_counter

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    ps.register_model("ServedCuda", decoder.build_model, adapter=adapter)
    answers = []
    for eager in (True, False):
        before = compilation_counter.num_cudagraph_captured
        with engine(directory, "ServedCuda", dtype="bfloat16", enforce_eager=eager, max_num_seqs=8) as llm:
            answers.append(greedy(llm, PROMPTS, TOKENS))
        assert (compilation_counter.num_cudagraph_captured > before) is not eager
    assert_same_generation(*answers, 0.05)


@pytest.mark.parametrize("adapter", ps.adapter_names())
def test_the_layers_of_every_library_answer_as_vllms_own_model(directory, adapter):
    ps.register_model("ServedCuda", decoder.build_model, adapter=adapter)
    answers = []
    for architecture in ("ServedCuda", None):
        with engine(directory, architecture) as llm:  # float32
            answers.append(greedy(llm, PROMPTS, TOKENS))
    assert_same_generation(*answers, 1e-3)


def test_weights_quantized_to_float8_while_they_are_loaded(directory):
    """The oracle: vLLM's own model, quantized alike."""
    ps.register_model("ServedCuda", decoder.build_model)
    answers = []
    for architecture in ("ServedCuda", None):
        with engine(directory, architecture, dtype="bfloat16", quantization="fp8") as llm:
            answers.append(greedy(llm, PROMPTS, TOKENS))
    assert_same_generation(*answers, 0.05)


def test_an_engine_on_the_trainers_own_memory_follows_its_steps(directory, tmp_path):
    context = ps.initialize("torch")
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    model.to(torch.bfloat16)
    config = ps.read_config(directory)
    alone = ps.save_config(tmp_path / "config", config, architecture="SharedCuda")
    ps.register_model("SharedCuda", model)
    with engine(alone, dtype="bfloat16", load_format="polyshard") as llm:
        before = greedy(llm, PROMPTS, TOKENS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        ps.WeightSync(model, context, llm)()
        after = greedy(llm, PROMPTS, TOKENS)
    ps.save_checkpoint(model, tmp_path / "changed", context, config=config)
    ps.register_model("ServedCuda", decoder.build_model, adapter="torch")
    with engine(tmp_path / "changed", "ServedCuda", dtype="bfloat16") as llm:
        wanted = greedy(llm, PROMPTS, TOKENS)
    assert after != before
    assert [tokens for tokens, _ in after] == [tokens for tokens, _ in wanted]


def test_the_latent_cache_gives_what_keys_written_out_give(tmp_path, monkeypatch):
    latent.checkpoint(tmp_path / "mla", **latent.take_deepseek_sizes(monkeypatch))
    ps.register_model("Latent", latent.build)
    answers = []
    for disabled in ("0", "1"):
        monkeypatch.setenv("VLLM_MLA_DISABLE", disabled)
        with engine(tmp_path / "mla", "Latent", dtype="bfloat16") as llm:
            answers.append([tokens for tokens, _ in greedy(llm, PROMPTS, TOKENS)])
    assert answers[0] == answers[1]
