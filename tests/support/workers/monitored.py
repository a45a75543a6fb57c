"""Ranks whose steps a `Monitor` measures."""

from __future__ import annotations

import time
from pathlib import Path

import torch

import polyshard as ps
from support.workers.on_ranks import build

SLOW = 0.15  # seconds


def monitored(folder: Path, model: Path) -> tuple[ps.StepRecord, ps.ModelFlops]:
    """Rank 0 is slow in reading, rank 1 in saving; each has as many rows as its number says. Steps are profiled.

    Then the ranks share the layers of a model, whose FLOPs are counted.
    """
    context = ps.initialize("torch", timeout=60)
    rank = context.rank
    sinks = [_never_called] if rank else [ps.JsonLines(folder / "steps.jsonl"), ps.TensorBoard(folder / "tensorboard")]
    batch = {"input_ids": torch.zeros(1 + rank, 8, dtype=torch.int64)}
    engine = ps.load_adapter("torch").engine(ps.column_parallel(4, 4, context), ps.AdamW(), context)
    with (
        ps.Monitor(context, sinks, flops=ps.model_flops(engine), peak_flops=1e6) as monitor,
        ps.profile_steps(folder / "trace", context, wait=1, warmup=1, active=1) as profiler,
    ):
        for step in range(3):
            with monitor.phase("data" if rank == 0 else "save"):
                time.sleep(SLOW)
            with monitor.phase("forward_backward"), torch.profiler.record_function(f"step {step}"):
                result = ps.BatchResult(loss=torch.tensor(2.0 - step), tokens=torch.tensor(20.0))
            update = ps.StepResult(grad_norm=0.5, skipped=step == 1)
            record = monitor.record(step + 1, [batch, batch], result, update, learning_rate=1e-3)
            profiler.step()
    ps.shutdown(context)
    return record, flops_at_tensor_2(model)


def flops_at_tensor_2(model: Path) -> ps.ModelFlops:
    context = ps.initialize("torch", tensor=2, timeout=60)
    return ps.model_flops(ps.load_adapter("torch").engine(build(model, context), ps.AdamW(), context))


def _never_called(record: ps.StepRecord) -> None:
    raise AssertionError(f"a sink of rank 1 was given {record}")
