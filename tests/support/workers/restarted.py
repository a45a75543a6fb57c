"""A training run that kills itself, and that the same call continues."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import polyshard as ps
from support.models.tiny import VOCAB
from support.workers.on_ranks import build

STEPS, SAVE_EVERY = 6, 2


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        options: options of the engine.
        asynchronous: whether states are saved in the background.
    """

    adapter: str
    precision: ps.Precision
    options: dict[str, Any]
    asynchronous: bool


def documents() -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(VOCAB) for _ in range(chance.choice([3, 7, 9, 16, 20]))] for _ in range(30)]


def train(folder: Path, model: Path, case: Case, kill: str | None = None) -> None:
    """Train to the last step, from the latest state in `folder`.

    Args:
        folder: gets states, a JSON line of each step, and in `begun` the step at which each process began.
        kill: `"micro-batch"` kills this process after the first of step 5's two micro-batches; `"save"` while it writes
            the state of step 4.
    """
    context = ps.initialize(case.adapter, timeout=60)
    ps.manual_seed(11, context)
    built = build(model, context).to(case.precision.parameters)
    adapter = ps.load_adapter(case.adapter)
    engine = adapter.engine(built, ps.AdamW(lr=3e-3), context, precision=case.precision, **case.options)
    rows = ps.PackedDocuments(documents(), 16)
    loader = ps.StepLoader(rows, context, batch=4, micro_batch=1, seed=5)

    latest = ps.latest_checkpoint(folder / "states")
    first = 0 if latest is None else ps.load_training_state(engine, latest, context, data=loader).step
    if context.rank == 0:
        folder.mkdir(exist_ok=True)
        with (folder / "begun").open("a") as file:
            file.write(f"{first}\n")
    pending = None
    with ps.Monitor(context, [ps.JsonLines(folder / "steps.jsonl")], flops=ps.model_flops(engine)) as monitor:
        for step, micro_batches in zip(range(first, STEPS), monitor.data(loader)):
            with monitor.phase("forward_backward"):
                killing = kill == "micro-batch" and step == 5
                if killing and isinstance(pending, ps.PendingSave):
                    pending.wait()  # a loaded machine may still be writing the state of step 4
                result = engine.train_batch(micro_batches, loss_of(engine, context, 1 if killing else None))
            with monitor.phase("step"):
                update = engine.step()
            monitor.record(step + 1, micro_batches, result, update)
            if (step + 1) % SAVE_EVERY == 0:
                if isinstance(pending, ps.PendingSave):
                    pending.wait()
                with monitor.phase("save"):
                    pending = ps.save_training_state(
                        engine,
                        folder / "states" / f"step-{step + 1:08d}",
                        context,
                        step=step + 1,
                        config=ps.read_config(model),
                        data=loader,
                        asynchronous=case.asynchronous,
                        progress=die_halfway if kill == "save" and step + 1 == 4 else None,
                    )
        if isinstance(pending, ps.PendingSave):
            pending.wait()
    engine.close()
    ps.shutdown(context)


def loss_of(engine: ps.TrainingEngine, context: ps.ParallelContext, die_at: int | None) -> Callable[..., torch.Tensor]:
    """The loss in chunks of tokens; at micro-batch `die_at` the process is killed instead."""
    module: Any = engine.module
    seen = 0

    def loss(hidden: torch.Tensor, micro_batch: Any) -> torch.Tensor:
        nonlocal seen
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        return ps.lm_loss(
            hidden, module.compute_logits, micro_batch["labels"], context, reduction="sum", chunk_tokens=8
        )

    return loss


def die_halfway(written: int, total: int) -> None:
    if 2 * written >= total:
        os.kill(os.getpid(), signal.SIGKILL)


def undisturbed_then_killed(folder: Path, model: Path, cases: list[Case]) -> None:
    for index, case in enumerate(cases):
        train(folder / f"whole-{index}", model, case)
    train(folder / "killed-0", model, cases[0], "micro-batch")


def restarted_then_killed(folder: Path, model: Path, cases: list[Case]) -> None:
    train(folder / "killed-0", model, cases[0])
    train(folder / "killed-1", model, cases[1], "save")


def restarted(folder: Path, model: Path, cases: list[Case]) -> None:
    train(folder / "killed-1", model, cases[1])
