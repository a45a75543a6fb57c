"""Serving on CUDA: sleep and wake, CUDA graphs, vLLM's latent cache. Never run where no GPU is lent: docs/gpu.md."""

import decoder
import pytest
import torch
from support import latent
from support.engines import engine, greedy
from support.models import save_tiny

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


def test_cuda_graphs_change_no_token(directory):
    ps.register_model("ServedCuda", decoder.build_model)
    answers = []
    for eager in (True, False):
        with engine(directory, "ServedCuda", dtype="bfloat16", enforce_eager=eager) as llm:
            answers.append([tokens for tokens, _ in greedy(llm, PROMPTS, TOKENS)])
    assert answers[0] == answers[1]


def test_the_latent_cache_gives_what_keys_written_out_give(tmp_path, monkeypatch):
    latent.checkpoint(tmp_path / "mla", **latent.take_deepseek_sizes(monkeypatch))
    ps.register_model("Latent", latent.build)
    answers = []
    for disabled in ("0", "1"):
        monkeypatch.setenv("VLLM_MLA_DISABLE", disabled)
        with engine(tmp_path / "mla", "Latent", dtype="bfloat16") as llm:
            answers.append([tokens for tokens, _ in greedy(llm, PROMPTS, TOKENS)])
    assert answers[0] == answers[1]
