"""A run that moves from engine to engine: each one loads the state of the one before, trains and saves."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import torch

import polyshard as ps
from polyshard.core.weight_table import stored_parts
from polyshard.weights.gather import gather_shards
from support.models.tiny import VOCAB
from support.workers.on_ranks import build

Place = tuple[str, int, dict]  # adapter, tensor-parallel size, options of the engine


def rows_of(step: int) -> torch.Tensor:
    return torch.randint(VOCAB, (4, 13), generator=torch.Generator().manual_seed(50 + step))


def warmup(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, total_iters=6)


def freeze(model: torch.nn.Module, patterns: tuple[str, ...]) -> None:
    for name, entry in ps.collect_layouts(model).items():
        if any(fnmatch(entry.name, pattern) for pattern in patterns):
            model.get_parameter(name).requires_grad_(False)


def full_weights(engine: ps.TrainingEngine, context: ps.ParallelContext) -> dict[str, torch.Tensor]:
    """The model's weights by checkpoint name, as copies."""
    weights = {}
    for name, shard in engine.weights():
        entry = engine.table[name]
        full = gather_shards(shard.detach().clone(), entry.layout, context.axis("tensor"))
        weights.update(zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full)))
    return weights


def moving_run(
    directory: Path,
    states: Path,
    places: list[Place],
    optimizer: Callable,
    frozen: tuple[str, ...] = (),
    parts: int = 1,
) -> list[tuple[float, dict]]:
    """The gradient norm of each step, one on each engine in `parts` micro-batches, and the weights after it."""
    outcomes = []
    for step, (adapter, tensor, options) in enumerate(places):
        context = ps.initialize(adapter, tensor=tensor, timeout=60)
        model = build(directory, context)
        freeze(model, frozen)
        engine = ps.load_adapter(adapter).engine(
            model, optimizer, context, max_grad_norm=0.5, scheduler=warmup, **options
        )
        if step:
            ps.load_training_state(engine, states / str(step - 1), context)
        rank, size = context.get_data_parallel_rank(), context.get_data_parallel_world_size()
        chunks = rows_of(step)[rank::size].chunk(parts)
        engine.train_batch([{"input_ids": rows[:, :-1], "labels": rows[:, 1:]} for rows in chunks])
        norm = engine.step().grad_norm
        weights = full_weights(engine, context)
        outcomes.append((norm, weights if context.rank == 0 else {}))
        ps.save_training_state(engine, states / str(step), context, step=step, config={"model_type": "llama"})
        engine.close()
        ps.shutdown(context)
    return outcomes
