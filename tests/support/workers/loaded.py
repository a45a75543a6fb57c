"""Ranks that read data with a `StepLoader`."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import polyshard as ps
from support.workers.on_ranks import build


def steps_of(loader: ps.StepLoader, steps: int) -> list[list[list[int]]]:
    """The token IDs of each step's micro-batches on this rank."""
    return [[batch["input_ids"].tolist() for batch in batches] for _, batches in zip(range(steps), loader)]


def read_and_go_on(documents: list, length: int, batch: int, steps: int) -> tuple[list, list[dict], str]:
    """Read some steps without workers, and some more from the position, in a worker process that reads ahead."""
    multiprocessing.current_process()._config["daemon"] = False  # else this rank may have no process of its own
    context = ps.initialize("torch", timeout=60)
    rows = ps.PackedDocuments(documents, length)
    first = ps.StepLoader(rows, context, batch=batch, micro_batch=1, seed=3)
    found, position = steps_of(first, steps), first.state_dict()
    second = ps.StepLoader(rows, context, batch=batch, micro_batch=1, seed=3, workers=1)
    second.load_state_dict(position)
    found += steps_of(second, steps)
    try:
        ps.StepLoader(ps.PackedDocuments(documents[context.rank :], length), context, batch=batch)
        error = ""
    except ps.ConfigurationError as problem:
        error = str(problem)
    return found, [position, second.state_dict()], error


def loss_at_context_2(directory: Path, documents: list, length: int) -> tuple[float, int]:
    return first_loss(directory, documents, length, ps.initialize("torch", context=2, timeout=60))


def first_loss(directory: Path, documents: list, length: int, context: ps.ParallelContext) -> tuple[float, int]:
    """The loss of a step with all rows, in two micro-batches, and its number of labels."""
    engine = ps.load_adapter("torch").engine(build(directory, context), ps.AdamW(), context)
    rows = ps.PackedDocuments(documents, length)
    loader = ps.StepLoader(rows, context, batch=len(rows), micro_batch=len(rows) // 2)
    result = engine.train_batch(next(iter(loader)))
    return float(result.loss), int(result.tokens)
