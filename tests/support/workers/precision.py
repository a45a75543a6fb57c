"""Training in a given precision, on each rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import polyshard as ps
from support.models.tiny import VOCAB
from support.workers.on_ranks import build

STEPS = 30
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def learnable_rows(step: int, rows: int = 4, length: int = 33) -> torch.Tensor:
    """Each token follows from the one before; one in ten is noise."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(VOCAB, (rows, 1), generator=generator)
    for _ in range(length - 1):
        following = (ids[:, -1:] * 5 + 3) % VOCAB
        noise = torch.randint(VOCAB, following.shape, generator=generator)
        ids = torch.cat((ids, torch.where(torch.rand(following.shape, generator=generator) < 0.1, noise, following)), 1)
    return ids


def losses_of_transformers_model(model: nn.Module, steps: int) -> list[float]:
    """Losses of transformers' model on the same rows, by torch's AdamW in one process: the oracle of `run`."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"])
    losses = []
    for step in range(steps):
        ids = learnable_rows(step)
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(engine: ps.TrainingEngine, context: ps.ParallelContext, first: int, steps: int, parts: int = 1) -> list[float]:
    """Mean loss of each step over all ranks."""
    rank, size = context.get_data_parallel_rank(), context.get_data_parallel_world_size()
    losses = []
    for step in range(first, first + steps):
        mine = learnable_rows(step)[rank::size]
        batches = [{"input_ids": part[:, :-1], "labels": part[:, 1:]} for part in mine.chunk(parts)]
        losses.append(float(engine.train_batch(batches).loss))
        assert not engine.step().skipped
    return losses


def start(directory: Path, context: ps.ParallelContext, precision: ps.Precision, engine: dict) -> ps.TrainingEngine:
    model = build(directory, context).to(precision.parameters)
    adapter = ps.load_adapter(type(context.linear).__name__.removesuffix("LinearAdapter").lower())
    return adapter.engine(model, ps.AdamW(**ADAMW), context, max_grad_norm=None, precision=precision, **engine)


def curves(directory: Path, adapter: str, cases: list[tuple[ps.Precision, dict, int]], tensor: int = 1) -> list:
    """The losses of each case."""
    context = ps.initialize(adapter, tensor=tensor, timeout=60)
    results = []
    for precision, options, parts in cases:
        engine = start(directory, context, precision, options)
        results.append(run(engine, context, 0, STEPS, parts))
        engine.close()
    ps.shutdown(context)
    return results


class One(nn.Module):
    """A weight that every step moves by the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.weight.float().sum() * input_ids.float().mean()


def small_updates(adapter: str, cases: list[tuple[ps.Precision, dict, int]]) -> list[float]:
    """The optimizer's value of a weight of 1 after updates of 1e-4, a thousand for the first case, 200 for others."""
    context = ps.initialize(adapter, timeout=60)
    values = []
    for index, (precision, options, _) in enumerate(cases):
        model = One().to(precision.parameters)
        optimizer = ps.AdamW(lr=1e-4, weight_decay=0.0)
        engine = ps.load_adapter(adapter).engine(
            model, optimizer, context, max_grad_norm=None, precision=precision, **options
        )
        for _ in range(200 if index else 1000):
            engine.backward(engine(torch.ones(1, 1, dtype=torch.int64)))
            engine.step()
        pieces = engine.weight_pieces()
        if precision.has_masters:
            pieces = [piece for piece in engine.optimizer_state().pieces if piece.slot == "master"]
        held = [float(piece.values.double().mean()) for piece in pieces if piece.values.numel()]
        values.append(held[0] if held else None)
        engine.close()
    ps.shutdown(context)
    return values


Kind = tuple[str, ps.Precision, dict]  # adapter, precision, options of the engine


def saved_and_moved(
    directory: Path, states: list[Path], kinds: list[Kind], scaled: list[Kind]
) -> tuple[list[list[float]], list[dict]]:
    """Train and save by the first kind; load, save and train on by each of the others. Losses after each start.

    Then the loss scale of float16 runs, of which the first overflows and the others continue.
    """
    losses = []
    for index, (adapter, precision, options) in enumerate(kinds):
        context = ps.initialize(adapter, timeout=60)
        engine = start(directory, context, precision, options)
        if index:
            ps.load_training_state(engine, states[index - 1], context)
        else:
            run(engine, context, 0, 3)
        config = {"model_type": "llama"}
        ps.save_training_state(engine, states[index], context, step=3, config=config)
        losses.append(run(engine, context, 3, 3))
        engine.close()
        ps.shutdown(context)
    return losses, [*loss_scales(directory, states[0].with_name("scaled"), scaled)]


def loss_scales(directory: Path, state: Path, kinds: list[Kind]) -> Iterator[dict]:
    """Overflow until a step is not skipped, by the first kind; load and save by each of the others."""
    for index, (adapter, precision, options) in enumerate(kinds):
        context = ps.initialize(adapter, timeout=60)
        engine = start(directory, context, precision, options)
        if index:
            ps.load_training_state(engine, state, context)
        else:
            ids = learnable_rows(0)[:1]
            batch = [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}]
            while not engine.updates:
                engine.train_batch(batch)
                engine.step()
        yield engine.optimizer_state().loss_scale
        ps.save_training_state(engine, state, context, step=1, config={"model_type": "llama"})
        engine.close()
        ps.shutdown(context)
