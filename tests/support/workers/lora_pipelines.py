"""LoRA on each rank of a pipeline, on schedules with several stages on a rank."""

from __future__ import annotations

from pathlib import Path

import decoder
from peft import LoraConfig

import polyshard as ps
from support.workers.lora import ADAMW, CLIP, FIELDS, run

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
