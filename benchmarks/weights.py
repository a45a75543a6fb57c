"""Saving, loading, converting and syncing SmolLM2's weights, relative to a plain copy or write of the same bytes.

    python benchmarks/weights.py [--rounds 5] [--json FILE] [--check]

Everything runs in one process: each round runs the plain operation and then polyshard's, and the ratio is that of the
medians. `--check` exits with status 1 if sync of colocated float32 weights is below half of memcpy's bandwidth, if the
fingerprints of a sync take longer than memcpy of the same bytes on both sides, or if a save or load needs more memory
besides the weights than one bucket.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from decoder import build_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from smollm2 import smollm2_directory
from support.engines import engine

import polyshard as ps
from polyshard.checkpoint.storage import BUCKET_BYTES
from polyshard.convert import convert
from polyshard.testing.memory import PeakMemory
from polyshard.weights.fingerprint import fingerprint

GOAL = 0.5  # sync of colocated float32 weights, as a fraction of memcpy's bandwidth
SLACK = 8 << 20  # memory of Python and the allocator


def seconds(action: Any) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def plain_write(path: Path, tensors: list[torch.Tensor]) -> None:
    """Write all bytes to one file, and sync it to disk."""
    with path.open("wb") as file:
        for tensor in tensors:
            array: Any = tensor.view(-1).view(torch.uint8).numpy()
            file.write(memoryview(array))
        file.flush()
        os.fsync(file.fileno())


def main(
    rounds: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    check: bool = False,
) -> None:
    torch.set_num_threads(1)
    source = smollm2_directory()
    context = ps.initialize("torch")
    config = ps.read_config(source)
    model = build_model(config, context)
    ps.load_checkpoint(model, source, context)
    weights = [parameter.detach() for parameter in model.parameters()]
    copies = [torch.empty_like(weight) for weight in weights]
    nbytes = sum(weight.nbytes for weight in weights)
    work = Path(tempfile.mkdtemp(prefix="polyshard-bench-"))

    def memcpy() -> None:
        for copy, weight in zip(copies, weights):
            copy.copy_(weight)

    def read_plain() -> None:
        with (work / "plain").open("rb") as file:
            for copy in copies:
                array: Any = copy.view(-1).view(torch.uint8).numpy()
                file.readinto(memoryview(array))

    def converted() -> None:
        shutil.rmtree(work / "converted", ignore_errors=True)
        convert(work / "saved", work / "converted")

    bases = {
        "memcpy": memcpy,
        "file write": lambda: plain_write(work / "plain", weights),
        "file read": read_plain,
    }
    disk = {
        "save": ("file write", lambda: ps.save_checkpoint(model, work / "saved", context, config=config)),
        "load, checksums verified": ("file read", lambda: ps.load_checkpoint(model, work / "saved", context)),
        "load": ("file read", lambda: ps.load_checkpoint(model, work / "saved", context, verify=False)),
        "convert": ("file write", converted),
        "fingerprints, one side": ("memcpy", lambda: [fingerprint(weight) for weight in weights]),
    }
    rows: list[dict[str, Any]] = []
    try:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("measuring", total=4)
            for base in bases.values():
                base()
            rows += measure(bases, disk, rounds, nbytes)
            bar.advance(task)
            for adapter, share, label in (
                ("torch", True, "sync, shared memory"),
                ("torch", False, "sync, copied"),
                ("vllm", True, "sync, vLLM's packed layers"),
            ):
                rows += sync_rows(model, context, source, adapter, share, label, bases, rounds, nbytes, work)
                bar.advance(task)
        peaks = {}
        for name, action in (("save", disk["save"][1]), ("load", disk["load"][1])):
            with PeakMemory() as peak:
                action()
            peaks[name] = peak.bytes
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(rows, peaks, nbytes)
    if json_file is not None:
        json_file.write_text(json.dumps({"rows": rows, "peaks": peaks, "bytes": nbytes}, indent=2))
    if check:
        sys.exit(judge(rows, peaks))


def measure(bases: dict[str, Any], cases: dict[str, tuple[str, Any]], rounds: int, nbytes: int) -> list[dict[str, Any]]:
    for _, action in cases.values():
        action()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (base, action) in cases.items():
            times[name].append((seconds(bases[base]), seconds(action)))
    rows = []
    for name, pairs in times.items():
        plain, ours = (statistics.median(column) for column in zip(*pairs))
        rows.append(
            {
                "what": name,
                "against": cases[name][0],
                "plain": nbytes / plain,
                "ours": nbytes / ours,
                "ratio": plain / ours,
            }
        )
    return rows


def sync_rows(
    model: Any,
    context: Any,
    source: Path,
    adapter: str,
    share: bool,
    label: str,
    bases: dict[str, Any],
    rounds: int,
    nbytes: int,
    work: Path,
) -> list[dict[str, Any]]:
    name = f"Bench{adapter}"
    ps.register_model(name, build_model, adapter=adapter)
    with engine(source, name, kv_cache_memory_bytes=256 << 20) as llm:
        sync = ps.WeightSync(model, context, llm, share=share)
        rows = measure(bases, {label: ("memcpy", sync)}, rounds, nbytes)
        if adapter == "vllm":

            def through_disk() -> None:
                saved = ps.save_checkpoint(model, work / "reload", context, config=ps.read_config(source))
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(saved)})
                llm.reset_prefix_cache()

            rows += measure({"save and reload": through_disk}, {f"{label} ": ("save and reload", sync)}, 2, nbytes)
        sync.close()
    return rows


def show(rows: list[dict[str, Any]], peaks: dict[str, int], nbytes: int) -> None:
    table = Table("", "GB/s", "against", "GB/s", "ratio", title=f"SmolLM2-135M in float32, {nbytes / 1e6:.0f} MB")
    for row in rows:
        goal = row["what"] == "sync, shared memory"
        verdict = "" if not goal else " [green]goal[/green]" if row["ratio"] >= GOAL else " [red]below 0.5[/red]"
        numbers = (f"{row['ours'] / 1e9:.2f}", row["against"], f"{row['plain'] / 1e9:.2f}")
        table.add_row(row["what"], *numbers, f"{row['ratio']:.2f}{verdict}")
    told = ", ".join(f"{name} {peak / 1e6:.1f} MB" for name, peak in peaks.items())
    table.caption = f"memory beside the weights: {told}; one bucket is {BUCKET_BYTES / 1e6:.1f} MB"
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def judge(rows: list[dict[str, Any]], peaks: dict[str, int]) -> int:
    by_name = {row["what"]: row["ratio"] for row in rows}
    ok = by_name["sync, shared memory"] >= GOAL and by_name["fingerprints, one side"] >= 0.5
    return 0 if ok and all(peak <= BUCKET_BYTES + SLACK for peak in peaks.values()) else 1


if __name__ == "__main__":
    typer.run(main)
