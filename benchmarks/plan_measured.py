"""Peak memory of a rank, as the operating system sees it, and seconds of a step: what `benchmarks/plan.py` compares."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import polyshard as ps
from polyshard.planning.decoder import planned_decoder

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_SMALL = 64 * 1024
_TIMES = 2


def measured(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case: peak bytes of a step beyond those of the process without a model, and seconds of a step.

    Tensors are mapped one by one and returned to the system when they are freed. The native kernels of the CPU, which
    keep other activations than a GPU's operators, are off.
    """
    os.environ |= {"CXX": "none", "POLYSHARD_ATTENTION": "cpu_flash"}
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _SMALL)
    libc.mallopt(_TRIM_THRESHOLD, _SMALL)
    first = {**cases[0], "config": {**cases[0]["config"], "hidden_size": 64, "num_hidden_layers": 2}}
    _measured(**{**first, "length": 64})  # loads what is loaded on first use
    return [_smallest([_measured(**case) for _ in range(_TIMES)]) for case in cases]


def _smallest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the smallest of each figure: libraries allocate on first use, and gloo may hold copies of messages."""
    return {name: min(run[name] for run in runs) for name in runs[0]}


def rates() -> dict[str, float]:
    """Return the rates of this rank while all ranks run: float32 FLOP/s, bytes/s of memory and of an all-reduce."""
    torch.set_num_threads(1)
    context = ps.initialize("torch", timeout=500)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    values = torch.randn(4 << 20)
    group = context.axis("data").group
    size = context.layout.data
    found = {
        "peak_flops": 2 * 1024**3 / _seconds(lambda: left @ right),
        "memory": 2 * values.nbytes / _seconds(values.clone),
        "link": 2
        * (size - 1)
        / size
        * values.nbytes
        / _seconds(lambda: torch.distributed.all_reduce(values, group=group)),
    }
    ps.shutdown(context)
    return found


def _seconds(action: Callable[[], Any], times: int = 5) -> float:
    """Return the shortest of several times."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best


def _measured(
    config: dict[str, Any],
    adapter: str,
    sizes: dict[str, Any],
    options: dict[str, Any],
    precision: ps.Precision,
    recompute: str,
    rows: int,
    length: int,
    micro_batches: int,
    **_: Any,
) -> dict[str, Any]:
    context = ps.initialize(adapter, timeout=500, **sizes)
    gc.collect()
    before = _resident("VmRSS")
    local = length // context.get_context_parallel_world_size()
    ids = torch.randint(0, config["vocab_size"], (rows, local))
    batches = [{"input_ids": ids, "labels": ids.roll(-1, -1)}] * micro_batches
    model = planned_decoder(ps.ModelConfig(**config), context).to(precision.parameters)
    settings = {"precision": precision, "recompute": recompute, **options}
    engine: Any = ps.load_adapter(adapter).engine(model, ps.AdamW(), context, **settings)
    for _ in range(2):
        engine.train_batch(batches)
        engine.step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started = time.perf_counter()
    engine.train_batch(batches)
    engine.step()
    seconds = time.perf_counter() - started
    peak = _resident("VmHWM") - before
    engine.close()
    ps.shutdown(context)
    del engine, model
    gc.collect()
    return {"peak": peak, "seconds": seconds}


def _resident(name: str) -> int:
    """Return a field of Linux's /proc/self/status, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
