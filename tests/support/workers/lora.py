"""LoRA training on each rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import polyshard as ps
from support.models.tiny import VOCAB
from support.workers.on_ranks import build

STEPS = 3
CLIP = 1.0  # below all gradient norms
# Names of Hugging Face and of the model; not all projections of `qkv`.
FIELDS = {
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": True,
    "init_lora_weights": False,
    "target_modules": ["q_proj", "v_proj", "o_proj", "gate_up", "down_proj"],
    "rank_pattern": {"up_proj": 2},
}
# With eps of 1, Adam's update is in proportion to the gradient, so that a wrong gradient shows.
ADAMW: dict[str, Any] = {"lr": 1e-1, "betas": (0.9, 0.95), "eps": 1.0, "weight_decay": 0.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: options of the engine, changes of the config, dtypes, and what is saved under `name`."""

    name: str
    options: dict
    fields: dict = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the base
    widened: bool = True  # matrices beside a bfloat16 base are float32
    saves: tuple[str, ...] = ("end",)


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


def start(directory: Path, context: ps.ParallelContext, case: Case) -> ps.TrainingEngine:
    from peft import LoraConfig

    model = build(directory, context).to(case.dtype)
    ps.add_lora(model, LoraConfig(**FIELDS | case.fields), context, autocast_adapter_dtype=case.widened)
    ps.manual_seed(1, context)
    adapter = ps.load_adapter(type(context.linear).__name__.removesuffix("LinearAdapter").lower())
    return adapter.engine(model, ps.AdamW(**ADAMW), context, max_grad_norm=CLIP, **case.options)


def run(engine: ps.TrainingEngine, context: ps.ParallelContext, first: int = 0, steps: int = STEPS) -> list[float]:
    """Loss and gradient norm of each step of two micro-batches."""
    figures = []
    for step in range(first, first + steps):
        parts = [mine(tensor, context).chunk(2) for tensor in rows(step)]
        batches = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*parts)]
        figures.append(float(engine.train_batch(batches).loss))
        norm = engine.step().grad_norm
        assert norm is not None
        figures.append(norm)
    return figures


def trained(directory: Path, out: Path, adapter: str, layouts: list[tuple[dict, list[Case]]]) -> dict[str, list]:
    """Losses and gradient norms of each case, and which parameters have optimizer state."""
    results = {}
    for sizes, cases in layouts:
        context = ps.initialize(adapter, timeout=60, **sizes)
        for case in cases:
            engine = start(directory, context, case)
            if "start" in case.saves:
                ps.save_lora(engine, out / case.name / "start", context)
            frozen = {n: w.clone() for n, w in engine.weights() if ".lora_" not in n}
            losses = run(engine, context)
            if "end" in case.saves:
                ps.save_lora(engine, out / case.name / "end", context)
            if "merged" in case.saves:
                folder = out / case.name / "merged"
                ps.save_merged_lora(engine, folder, context, config=ps.read_config(directory))
            for name, weight in engine.weights():
                assert name not in frozen or torch.equal(weight, frozen[name]), name
            results[case.name] = losses, {piece.parameter for piece in engine.optimizer_state().pieces}
            engine.close()
        ps.shutdown(context)
    return results


def logits_of(directory: Path, adapter: Path, sizes: dict) -> torch.Tensor:
    """The logits of step 0 of a model whose adapter PEFT has written."""
    from peft import LoraConfig

    context = ps.initialize(timeout=60, **sizes)
    model = build(directory, context)
    ps.add_lora(model, LoraConfig.from_pretrained(str(adapter)), context)
    ps.load_lora(model, adapter, context)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]  # inference_mode
    with torch.no_grad():
        logits = ps.gather_logits(model.compute_logits(model(rows(0)[0])), context, VOCAB)
    ps.shutdown(context)
    return logits


Kind = tuple[str, dict, Case]  # adapter, sizes, case


def saved_and_moved(directory: Path, states: list[Path], kinds: list[Kind]) -> list[list[float]]:
    """Train and save by the first kind; load, save and train on by each of the others. Losses and norms of each."""
    losses = []
    for index, (adapter, sizes, case) in enumerate(kinds):
        context = ps.initialize(adapter, timeout=60, **sizes)
        engine = start(directory, context, case)
        if index:
            ps.load_training_state(engine, states[index - 1], context)
        else:
            run(engine, context, 0, 2)
        ps.save_training_state(engine, states[index], context, step=2, config=ps.read_config(directory))
        losses.append(run(engine, context, 2, 2))
        engine.close()
        ps.shutdown(context)
    return losses
