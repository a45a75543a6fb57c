"""A trainer's LoRA adapter in a running engine: log-probabilities are those of PEFT on transformers after each sync."""

import decoder
import peft
import pytest
import support.vllm_required  # noqa: F401
import torch
import transformers
from support.engines import greedy
from support.models.tiny import tiny_config, tiny_model

import polyshard as ps
from polyshard.adapters.vllm import compat

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], list(range(60)), list(range(60))]  # the last meets the prefix cache
TOKENS = 6
BOUND = 2e-5
CONFIG = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["qkv", "o_proj", "up_proj"]}
OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": True}


def trainer_of(directory, context, **changes):
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    ps.add_lora(model, peft.LoraConfig(**CONFIG | changes), context)
    return ps.load_adapter("torch").engine(model, ps.AdamW(lr=5e-2), context)


def check_served(rollouts, model):
    """Each rollout's log-probabilities are the model's, to which they are the likeliest tokens."""
    for (rollout,) in rollouts:
        ids = torch.tensor([[*rollout.prompt, *rollout.tokens]])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)[len(rollout.prompt) - 1 : -1]
        found = torch.tensor(rollout.logprobs)
        assert (scores.gather(1, ids[0, len(rollout.prompt) :, None])[:, 0] - found).abs().max() < BOUND
        assert (scores.max(-1).values - found).abs().max() < BOUND


@pytest.mark.parametrize("colocated", [True, False], ids=["in this process", "in processes of its own"])
def test_an_engine_serves_the_adapter_of_the_last_sync(tmp_path, colocated, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if colocated else "1")
    base, other = tmp_path / "base", tmp_path / "other"
    for seed, directory in enumerate((base, other)):
        tiny_model(tiny_config("llama", hidden_size=96, head_dim=32), seed).save_pretrained(directory)
    context = ps.initialize("torch")
    trainer = trainer_of(base, context)
    ps.register_model("LoraSynced", decoder.build_model)

    def by_peft():
        saved = ps.save_lora(trainer, tmp_path / "saved", context)
        return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), str(saved))

    with ps.RolloutEngine(other, "LoraSynced", trainer, context, colocated=colocated, **OPTIONS) as engine:
        served = []
        for version in ("1", "2"):
            report = engine.sync()
            assert (report.version, report.shared_bytes) == (version, 0)
            assert report.tensors == 2 * 5 * 2
            rollouts = engine.generate(PROMPTS, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
            check_served(rollouts, by_peft())
            served.append([rollout.logprobs for (rollout,) in rollouts])
            assert {rollout.version for (rollout,) in rollouts} == {version}
            ids = torch.arange(24).reshape(2, 12)
            trainer.backward(trainer(ids[:, :-1], labels=ids[:, 1:]))
            trainer.step()
        assert served[0] != served[1]

        # A sync that fails leaves all requests at the version before.
        with monkeypatch.context() as patched:
            patched.setattr(engine.llm.llm_engine, "reset_prefix_cache", lambda: False)
            with pytest.raises(ps.WeightSyncError, match="did not reset its prefix cache"):
                engine.sync()
        again = engine.generate(PROMPTS, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        assert {rollout.version for (rollout,) in again} == {"2"}
        for before, (after,) in zip(served[1], again):
            assert after.logprobs == pytest.approx(before, abs=BOUND)
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
