"""A trainer with a LoRA adapter beside an engine, in one process or on each rank."""

from __future__ import annotations

from pathlib import Path

import decoder
import torch

import polyshard as ps

PROMPTS = [[1, 2, 3, 4, 5], list(range(60)), list(range(60))]  # the last meets the prefix cache
TOKENS = 6
CONFIG = {
    "r": 4,
    "lora_alpha": 8,
    "init_lora_weights": False,
    "target_modules": ["qkv", "o_proj", "up_proj"],
    "use_rslora": True,
    "rank_pattern": {"up_proj": 2},
    "alpha_pattern": {"up_proj": 3},
}
OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": True}


def trainer_of(directory: Path, context: ps.ParallelContext, adapter: str = "torch", **changes) -> ps.TrainingEngine:
    import peft

    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    ps.add_lora(model, peft.LoraConfig(**CONFIG | changes), context)
    return ps.load_adapter(adapter).engine(model, ps.AdamW(lr=5e-2), context)


def sample(engine: ps.RolloutEngine) -> list[ps.Rollout]:
    found = engine.generate(PROMPTS, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return [rollout for (rollout,) in found]


def step(trainer: ps.TrainingEngine) -> None:
    ids = torch.arange(24).reshape(2, 12)
    trainer.backward(trainer(ids[:, :-1], labels=ids[:, 1:]))
    trainer.step()
