"""LoRA on each rank of a pipeline, on schedules with several stages on a rank."""

from __future__ import annotations

from pathlib import Path

import decoder
import torch
from peft import LoraConfig

import polyshard as ps
from support.workers.lora import ADAMW, CLIP, FIELDS, run
from support.workers.lora_sync import OPTIONS, sample, step, trainer_of

# One stage has a larger rank than the other, for which both must start the engine.
SERVED = {**FIELDS, "rank_pattern": {"layers.1.mlp.up_proj": 12}}
MISTAKES = {
    "an unknown target": {"target_modules": ["q_proj", "colour_proj"]},
    "no target": {"target_modules": ["colour_proj"]},
    "a stage without targets": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def built(directory: Path, context: ps.ParallelContext, schedule: str) -> ps.Stages:
    config = ps.read_config(directory)
    plan = ps.pipeline_plan(config.num_hidden_layers, context.layout.pipeline, schedule=schedule)
    stages = ps.build_stages(decoder.build_model, config, context, plan)
    ps.load_checkpoint(stages, directory, context)
    return stages


def trained(directory: Path, schedules: tuple[str, ...], out: Path) -> tuple[dict, dict]:
    """Losses and gradient norms of each schedule, whose adapters are saved, and what each mistake says."""
    context = ps.initialize("torch", pipeline=2, timeout=60)
    found, told = {}, {}
    for name, fields in MISTAKES.items():
        try:
            ps.add_lora(built(directory, context, "1f1b"), LoraConfig(**{"r": 2, **fields}), context)
        except ps.ConfigurationError as error:
            told[name] = str(error)
    for schedule in schedules:
        model = ps.add_lora(built(directory, context, schedule), LoraConfig(**FIELDS), context)
        engine = ps.load_adapter("torch").engine(model, ps.AdamW(**ADAMW), context, max_grad_norm=CLIP)
        found[schedule] = run(engine, context)
        ps.save_lora(engine, out / schedule, context)
        loaded = ps.add_lora(built(directory, context, "1f1b"), LoraConfig(**FIELDS), context, seed=1)
        ps.load_lora(loaded, out / schedule, context)
        ps.save_lora(loaded, out / f"{schedule} again", context)
        engine.close()
    ps.shutdown(context)
    return found, told


def served(base: Path, other: Path, out: Path) -> list[list[ps.Rollout]]:
    """Samples after each of two syncs of a pipelined trainer into an engine over the same two ranks, and after the sync
    of a Megatron trainer with tensor parallel into the same engine.
    """
    context = ps.initialize("torch", pipeline=2, timeout=120)
    ps.register_model("LoraSynced", decoder.build_model)
    model = ps.add_lora(built(base, context, "1f1b"), LoraConfig(**SERVED), context)
    trainer = ps.load_adapter("torch").engine(model, ps.AdamW(lr=5e-2), context)
    ids = torch.arange(24).reshape(2, 12)
    found = []
    with ps.RolloutEngine(other, "LoraSynced", trainer, context, **OPTIONS) as engine:
        for version in ("1", "2"):
            assert engine.sync().tensors == 2 * 2 * 6  # matrices, layers, projections
            found.append(sample(engine))
            ps.save_lora(trainer, out / version, context)
            trainer.train_batch([{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * 2)
            trainer.step()
        sharded = ps.initialize("megatron", tensor=2, timeout=120)
        other_trainer = trainer_of(base, sharded, "megatron")
        step(other_trainer)
        with ps.LoraSync(other_trainer, sharded, engine.llm) as sync:  # the adapter's number is that of the one before
            sync()
            found.append(sample(engine))
        ps.save_lora(other_trainer, out / "3", sharded)
        other_trainer.close()
    trainer.close()
    return found
