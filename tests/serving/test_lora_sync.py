"""A trainer's LoRA adapter in a running engine: log-probabilities are those of PEFT on transformers after each sync."""

import decoder
import peft
import pytest
import support.vllm_required  # noqa: F401
import torch
import transformers
from support.engines import greedy
from support.models.tiny import tiny_config, tiny_model
from support.scripts import on_engine_ranks
from support.workers.lora_pipelines import served
from support.workers.lora_sync import OPTIONS, PROMPTS, TOKENS, sample, step, trainer_of

import polyshard as ps
from polyshard.adapters.vllm import compat

pytestmark = pytest.mark.vllm

BOUND = 5e-5


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The trainer's base, and other weights that the engine is started with."""
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("base", "other")):
        tiny_model(tiny_config("llama", hidden_size=96, head_dim=32), seed).save_pretrained(folder / name)
    return folder / "base", folder / "other"


def by_peft(base, adapter):
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(adapter))


def check_served(rollouts, model):
    """Each rollout's log-probabilities are the model's, to which they are the likeliest tokens."""
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt, *rollout.tokens]])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)[len(rollout.prompt) - 1 : -1]
        found = torch.tensor(rollout.logprobs)
        assert (scores.gather(1, ids[0, len(rollout.prompt) :, None])[:, 0] - found).abs().max() < BOUND
        assert (scores.max(-1).values - found).abs().max() < BOUND


@pytest.mark.parametrize("colocated", [True, False], ids=["in this process", "in processes of its own"])
def test_an_engine_serves_the_adapter_of_the_last_sync(directories, tmp_path, colocated, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if colocated else "1")
    base, other = directories
    context = ps.initialize("torch")
    trainer = trainer_of(base, context)
    ps.register_model("LoraSynced", decoder.build_model)
    with ps.RolloutEngine(other, "LoraSynced", trainer, context, colocated=colocated, **OPTIONS) as engine:
        served = []
        for version in ("1", "2"):
            report = engine.sync()
            assert (report.version, report.shared_bytes, report.tensors) == (version, 0, 2 * 5 * 2)
            served.append(sample(engine))
            check_served(served[-1], by_peft(base, ps.save_lora(trainer, tmp_path / "saved", context)))
            assert {rollout.version for rollout in served[-1]} == {version}
            step(trainer)
        assert [r.logprobs for r in served[0]] != [r.logprobs for r in served[1]]

        # A sync that fails leaves all requests at the version before.
        with monkeypatch.context() as patched:
            patched.setattr(engine.llm.llm_engine, "reset_prefix_cache", lambda **_: False)
            with pytest.raises(ps.WeightSyncError, match="did not reset its prefix cache"):
                engine.sync()
        for before, after in zip(served[1], sample(engine)):
            assert after.version == "2"
            assert after.logprobs == pytest.approx(before.logprobs, abs=BOUND)
        if not colocated:
            return

        # The frozen weights came by the first sync. Without the adapter the engine is the base.
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        for prompt, (tokens, logprobs) in zip(PROMPTS, greedy(engine.llm, PROMPTS, TOKENS)):
            with torch.no_grad():
                scores = plain(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            assert (scores.max(-1).values - torch.tensor(logprobs)).abs().max() < BOUND

        wide = trainer_of(base, context, r=16)
        with pytest.raises(ps.ConfigurationError, match=r"smaller max_lora_rank .*got 8, expected at least 16"):
            ps.LoraSync(wide, context, engine.llm)
        sync = ps.LoraSync(trainer, context, engine.llm)
        with pytest.raises(ps.WeightSyncError, match="no LoRA adapter has been sent"):
            _ = sync.request
        monkeypatch.setattr(compat, "unfinished_requests", lambda llm: ["one"])
        with pytest.raises(ps.WeightSyncError, match="1 unfinished requests: their KV cache was computed with the old"):
            sync()


def test_trainers_over_two_ranks_are_served_over_the_same_ones(directories, tmp_path):
    """Pipeline stages whose adapters have other ranks, and shards of Megatron's layers."""
    base, other = directories
    for outcome in on_engine_ranks(served, 2, base, other, tmp_path):
        assert len({str(rollouts) for rollouts in outcome}) == 3
        for version, rollouts in zip(("1", "2", "3"), outcome, strict=True):
            check_served(rollouts, by_peft(base, tmp_path / version))
