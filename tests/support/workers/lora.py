"""LoRA training on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import polyshard as ps
from support.models.tiny import VOCAB
from support.workers.on_ranks import build

STEPS = 3
FIELDS = {"r": 4, "lora_alpha": 8, "use_rslora": True, "init_lora_weights": False}
# With eps of 1, Adam's update is in proportion to the gradient, so that a wrong gradient shows.
ADAMW: dict[str, Any] = {"lr": 3e-1, "betas": (0.9, 0.95), "eps": 1.0, "weight_decay": 0.0}


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows of a step; the number of labels differs from row to row."""
    ids = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(step))
    labels = ids.roll(-1, dims=1)
    for row in range(4):
        labels[row, 11 - row :] = -100
    return ids, labels


def mine(tensor: torch.Tensor, context: ps.ParallelContext) -> torch.Tensor:
    """This rank's rows, and its part of their tokens."""
    part = tensor[context.get_data_parallel_rank() :: context.get_data_parallel_world_size()]
    return ps.context_shard(part, context, dim=1) if context.get_context_parallel_world_size() > 1 else part


def start(
    directory: Path,
    context: ps.ParallelContext,
    options: dict,
    fields: dict,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
    seed: int = 0,
) -> ps.TrainingEngine:
    from peft import LoraConfig

    model = build(directory, context).to(dtype)
    model = ps.add_lora(model, LoraConfig(**FIELDS | fields), context, seed=seed)
    if weights is not None:
        ps.load_lora(model, weights, context)
    adapter = ps.load_adapter(type(context.linear).__name__.removesuffix("LinearAdapter").lower())
    return adapter.engine(model, ps.AdamW(**ADAMW), context, max_grad_norm=None, **options)


def run(engine: ps.TrainingEngine, context: ps.ParallelContext, first: int = 0, steps: int = STEPS) -> list[float]:
    """The loss of each step."""
    losses = []
    for step in range(first, first + steps):
        ids, labels = (mine(tensor, context) for tensor in rows(step))
        losses.append(float(engine.train_batch([{"input_ids": ids, "labels": labels}]).loss))
        engine.step()
    return losses


def trained(directory: Path, out: Path, adapter: str, sizes: dict, cases: list[tuple[str, dict, dict, Any]]) -> dict:
    """For each case (name, options of the engine, fields of the config, dtype): the losses of some steps, and whether
    the optimizer holds state of the matrices only. The adapter is saved before and after, and merged."""
    context = ps.initialize(adapter, timeout=60, **sizes)
    results = {}
    for name, options, fields, dtype in cases:
        engine = start(directory, context, options, fields, dtype)
        ps.save_lora(engine, out / name / "start", context)
        frozen = {n: w.clone() for n, w in engine.weights() if ".lora_" not in n}
        losses = run(engine, context)
        ps.save_lora(engine, out / name / "end", context)
        ps.save_merged_lora(engine, out / name / "merged", context, config=ps.read_config(directory))
        slots = {piece.parameter for piece in engine.optimizer_state().pieces}
        assert all(".lora_" in parameter for parameter in slots), slots
        for n, w in engine.weights():
            assert n not in frozen or torch.equal(w, frozen[n]), n
        results[name] = losses
        engine.close()
    ps.shutdown(context)
    return results
