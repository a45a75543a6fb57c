"""Planned against measured memory of nineteen layouts, on two ranks of this machine's CPU.

    python benchmarks/plan.py [--json FILE] [--check] [--adapters torch,megatron]

It also measures the seconds of a step in float32. The rates of this machine (matrix products, memory, all-reduce) and
an efficiency, fitted to every second of those layouts, predict them. `polyshard plan --calibration FILE` reads both
from the JSON file.

Each layout trains a small decoder, twice, and the smaller peak of memory counts. The operating system measures it, with
the kernels of the CPU that keep what a GPU's operators keep. `--check` exits with status 1 if a plan is more than 10 %
off, more than 5 % in the median, or more than 3 % below the measured memory: the system also counts what is not a
tensor, such as buffers of gloo.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from plan_measured import measured, rates
from report import Report

import polyshard as ps
from polyshard.launch.ranks import run_ranks
from polyshard.planning.communication import payload_of
from polyshard.planning.compute import StepTime, step_time
from polyshard.planning.decoder import planned_decoder
from polyshard.planning.library import Library
from polyshard.planning.memory import Memory, memory_of
from polyshard.planning.strategy import CASTS, MASTERS, Strategy, sizes
from polyshard.planning.trace import Trace, record

RANKS = 2
WORST, MEDIAN, BELOW = 0.10, 0.05, 0.03
FLOAT32 = ps.Precision()
NARROW = ps.Precision(parameters=torch.bfloat16, reduce=torch.bfloat16)  # FairScale's masters
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
# While a bucket is reduced, gloo holds a copy of it, which NCCL does not need.
_SMALL_BUCKETS = {"ddp_options": {"bucket_cap_mb": 4}}
_TENSOR, _SEQUENCE, _CONTEXT = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"context": 2}


def case(adapter: str, sharding: str, sizes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the arguments of a measured run, and the sharding that is planned for it."""
    options = {
        "data": {},
        "fsdp": {"data_parallel": "fsdp"},
        **{
            f"zero{stage}": {"zero_stage": stage} if adapter in ("deepspeed", "fairscale") else {}
            for stage in (1, 2, 3)
        },
    }[sharding]
    found = {"config": CONFIG, "adapter": adapter, "sizes": sizes, "options": options, "precision": FLOAT32}
    found |= {"recompute": "none", "rows": 2, "length": 512, "micro_batches": 1}
    return {**found, "sharding": sharding, **changes}


CASES = (
    case("torch", "data", {}),
    case("torch", "data", {}, micro_batches=2, recompute="full"),
    case("torch", "data", {}, precision=MASTERS, recompute="selective", options=_SMALL_BUCKETS),
    case("torch", "fsdp", {}),
    case("torch", "fsdp", {}, recompute="full"),
    case("torch", "fsdp", {}, precision=CASTS, recompute="selective"),
    case("torch", "fsdp", {}, micro_batches=2),
    case("torch", "data", _TENSOR),
    case("torch", "data", _TENSOR, recompute="full"),
    case("torch", "data", _SEQUENCE, recompute="selective"),
    case("torch", "data", _CONTEXT),
    case("torch", "fsdp", _CONTEXT, recompute="full"),
    case("megatron", "zero1", {}, precision=MASTERS, recompute="full"),
    case("deepspeed", "zero1", {}, precision=MASTERS, recompute="full"),
    case("deepspeed", "zero2", {}, precision=MASTERS, recompute="full"),
    case("deepspeed", "zero3", {}, precision=MASTERS, recompute="full"),
    case("fairscale", "zero1", {}, recompute="full", options={"zero_stage": 1, **_SMALL_BUCKETS}),
    case("fairscale", "zero1", {}, precision=NARROW, micro_batches=2, options={"zero_stage": 1, **_SMALL_BUCKETS}),
    case("fairscale", "zero2", {}, recompute="full"),
)


def planned(chosen: dict[str, Any]) -> tuple[Strategy, Trace, Memory]:
    """Return the strategy of a case, its trace and its planned memory."""
    strategy = Strategy(
        layout=ps.ParallelLayout.for_world(RANKS, **chosen["sizes"]),
        sharding=chosen["sharding"],
        **{name: chosen[name] for name in ("precision", "recompute", "rows", "micro_batches")},
    )
    trace, _ = record(
        planned_decoder,
        ps.ModelConfig(**chosen["config"]),
        strategy.layout,
        dtype=strategy.precision.compute_dtype,
        **{name: chosen[name] for name in ("rows", "length", "recompute")},
    )
    library = Library.of(ps.load_adapter(chosen["adapter"]))
    return strategy, trace, memory_of(strategy, trace, library=library)


def cluster() -> ps.Cluster:
    """Return this machine's cores as a cluster of ranks, with their measured rates and an efficiency of 1."""
    found = run_ranks(rates, RANKS)
    peak, memory, link = (min(rank[name] for rank in found) for name in ("peak_flops", "memory", "link"))
    return ps.Cluster(
        gpus=RANKS,
        memory=1 << 40,
        gpus_per_node=RANKS,
        nvlink=2 * link / 1e9,  # both directions
        peak_flops=peak,
        memory_bandwidth=memory / 1e9,
        efficiency=1.0,
        link_efficiency=1.0,
        reserve=0,
    )


def add_times(report: Report, machine: ps.Cluster, times: list[tuple[dict[str, Any], StepTime]]) -> ps.Cluster | None:
    """Fit the efficiency to every second row, and add predicted times to all of them.

    Args:
        report: gets the measured layouts as rows.
        machine: the ranks' rates, with an efficiency of 1.
        times: rows with measured seconds, and their planned times on `machine`.

    Returns:
        The machine with the fitted efficiency; None if other programs ran, so that no efficiency fits.
    """
    fits = [
        (time.compute + time.bubble) / (row["s measured"] - time.total + time.compute + time.bubble)
        for row, time in times[::2]
    ]
    efficiency = statistics.median(fits)
    if not 0 < efficiency <= 1:
        report.missed.append(f"no times: the fitted efficiency is {efficiency:.2f}. Run again on an idle machine")
        return None
    for row, time in times:
        row["s planned"] = time.total + (time.compute + time.bubble) * (1 / efficiency - 1)
        row["time ratio"] = row["s planned"] / row["s measured"]
    return replace(machine, efficiency=efficiency)


def main(
    adapters: Annotated[str, typer.Option(help="Comma-separated.")] = "torch,megatron,deepspeed,fairscale",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if a goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    columns = ("adapter", "layout", "sharding", "precision", "recompute", "micro-batches", "MB measured", "MB planned")
    report = Report((*columns, "ratio", "s measured", "s planned", "time ratio"), lines)
    machine, times = cluster(), []
    for adapter in adapters.split(","):
        cases = [chosen for chosen in CASES if chosen["adapter"] == adapter]
        for chosen, *ranks in zip(cases, *run_ranks(measured, RANKS, cases, timeout=900)):
            strategy, trace, memory = planned(chosen)
            nbytes = memory.total
            peak = max(found["peak"] for found in ranks)
            report.add(
                adapter=adapter,
                layout=sizes(strategy.layout),
                sharding=strategy.sharding,
                precision=str(strategy.precision.compute_dtype).removeprefix("torch."),
                recompute=strategy.recompute,
                **{
                    "micro-batches": strategy.micro_batches,
                    "MB measured": peak / 1e6,
                    "MB planned": nbytes / 1e6,
                    "ratio": nbytes / peak,
                },
            )
            if strategy.precision == FLOAT32:
                row = report.rows[-1]
                row["s measured"] = max(found["seconds"] for found in ranks)
                times.append((row, step_time(strategy, trace, payload_of(strategy, trace), memory, machine)))
            if not 1 - BELOW <= nbytes / peak <= 1 + WORST:
                report.missed.append(f"{adapter}, {strategy}: planned {nbytes / peak:.3f} of the measured memory")
    median = statistics.median(abs(row["ratio"] - 1) for row in report.rows)
    if median > MEDIAN:
        report.missed.append(f"the median error is {median:.1%}, not {MEDIAN:.0%}")
    calibrated = add_times(report, machine, times) if times else None
    report.show()
    report.save(json_file, torch.device("cpu"))
    if json_file is not None and calibrated is not None:
        names = ("peak_flops", "efficiency", "memory_bandwidth", "nvlink", "link_efficiency")
        figures = json.loads(json_file.read_text())
        figures["calibration"] = {name: getattr(calibrated, name) for name in names}
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if check and report.missed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
