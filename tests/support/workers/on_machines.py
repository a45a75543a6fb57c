"""A training run under torchrun that continues from its latest state: started as a script, on several machines.

It prints a line for each step: its number, the number of ranks, the loss, and the rows that all ranks together have
read. It waits at `step-N` or `save-N` while a file of that name is in the folder `--pauses`, so that a test can cut a
link there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import polyshard as ps
from polyshard.checkpoint.directory import complete_checkpoints
from polyshard.core.ranks import Ranks

VOCAB, LENGTH, ROWS, BATCH = 61, 8, 48, 4


def rows() -> list[list[int]]:
    """Rows that all begin with another token."""
    return [[index, *((7 * index + 3 * k) % VOCAB for k in range(1, LENGTH))] for index in range(ROWS)]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, 256)
        self.head = torch.nn.Linear(256, VOCAB)

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        return self.embedding(input_ids)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def train(states: str, steps: int, timeout: float, pauses: Path | None = None) -> None:
    context = ps.initialize("torch", timeout=timeout)
    torch.manual_seed(0)
    ranks = Ranks.of(context)
    engine = ps.load_adapter("torch").engine(Model(), ps.AdamW(lr=1e-2), context)
    loader = ps.StepLoader(ps.PackedDocuments(rows(), LENGTH), context, batch=BATCH, micro_batch=1, seed=5)
    latest = ps.latest_checkpoint(states)
    first = 0 if latest is None else ps.load_training_state(engine, latest, context, data=loader).step
    say(ranks, {"begins": first, "ranks": ranks.size})

    def pause(where: str) -> None:
        """Wait at a place that the test has named, so that it can cut a link there."""
        place = None if pauses is None else pauses / where
        if place is not None and place.exists():
            print(f"paused {where}", flush=True)
            while place.exists():
                time.sleep(0.05)

    for step, batches in zip(range(first, steps), loader):
        read = sorted(int(batch["input_ids"].flatten()[0]) for batch in batches)
        pause(f"step-{step + 1}")
        loss = engine.train_batch(batches).loss
        engine.step()
        taken = sorted(row for part in ranks.gather(read) for row in part)
        say(ranks, {"step": step + 1, "ranks": ranks.size, "loss": round(float(loss), 5), "rows": taken})
        ps.save_training_state(
            engine,
            f"{states}/step-{step + 1:04d}",
            context,
            step=step + 1,
            config={},
            data=loader,
            max_shard_bytes=50_000,
            progress=lambda done, total, step=step: pause(f"save-{step + 1}"),
        )
    if ranks.rank == 0:
        print("states", json.dumps(sorted(path.name for _, path in complete_checkpoints(states))), flush=True)
    engine.close()
    ps.shutdown(context)


def say(ranks: Ranks, line: dict[str, object]) -> None:
    if ranks.rank == 0:
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("states")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=8.0)
    parser.add_argument("--pauses", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    try:
        train(given.states, given.steps, given.timeout, given.pauses)
    except ps.PolyshardError as error:
        print(f"failed {type(error).__name__}: {error}", flush=True)
        print(f"failed after {time.monotonic() - began:.1f} s", flush=True)
        raise


if __name__ == "__main__":
    main()
