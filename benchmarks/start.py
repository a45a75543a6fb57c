"""The time that polyshard adds to an engine's start and to its first request.

    python benchmarks/start.py [MODEL] [--dtype bfloat16] [--rounds 7] [--profile] [--json FILE] [--check]

Each start is a separate process without others at the same time, alternating with vLLM's own model; reports medians.
MODEL is as in `serving.py`. `--profile` starts the registered model once more under cProfile and prints polyshard's
slowest functions. `--check` exits with status 1 if polyshard adds more than 5 %.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving import ENGINES, LOADS, Options, Running, environment_of, prepare, start

NAMES = ("native", "polyshard")
FIRST = next(place for place, load in enumerate(LOADS) if load.name.startswith("first token"))
PARTS = ("process until it serves", "of it, LLM(...)", "first request", "the same again")
GOAL, CHECKED = 1.05, PARTS[:3]


def main(
    model: Annotated[str, typer.Argument(help="Directory, or qwen3.")] = "",
    dtype: str = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Starts of each, after one that fills the disk's cache.")] = 7,
    threads: Annotated[int, typer.Option(help="OpenMP threads.")] = 1,
    profile: Annotated[bool, typer.Option(help="Where polyshard's own functions took longest.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 where the goal is missed.")] = False,
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run the comparison."""
    if worker:
        profiled(model, dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = prepare(model, Path(scratch))
        times: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in NAMES}
        for index in track(range(rounds + 1), "starts"):
            for name in NAMES if index % 2 else reversed(NAMES):
                for part, seconds in zip(PARTS, once(name, directory, dtype, threads), strict=True):
                    if index:
                        times[name][part].append(seconds)
        if profile:
            command = [sys.executable, __file__, str(directory), "--dtype", dtype, "--worker"]
            subprocess.run(command, check=True, env=environment_of(Options(dtype, threads=threads)))
    report(times, dtype, json_file, check)


def once(name: str, directory: Path, dtype: str, threads: int) -> tuple[float, ...]:
    """Return the seconds of each part of one start."""
    before = time.perf_counter()
    running = Running(name, directory, Options(dtype, threads=threads))
    whole = time.perf_counter() - before
    requests = running.run(FIRST), running.run(FIRST)
    running.close()
    return whole, running.seconds, *requests


def report(times: dict[str, dict[str, list[float]]], dtype: str, json_file: Path | None, check: bool) -> None:
    """Print the table; with `check`, exit with status 1 if a goal is missed."""
    table = Table(title=f"engine start and first request ({dtype}, eager); medians")
    for column in ("", "native", "polyshard", "polyshard / native"):
        table.add_column(column, justify="left" if not column else "right")
    ratios = {}
    for part in PARTS:
        native, own = (statistics.median(times[name][part]) for name in NAMES)
        ratios[part] = own / native
        table.add_row(part, f"{native:.2f} s", f"{own:.2f} s", f"{own / native:.2f}")
    Console(width=120).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"dtype": dtype, "ratios": ratios, "seconds": times}, indent=2))
    missed = [part for part in CHECKED if ratios[part] > GOAL]
    for part in missed:
        print(f"missed: {part}: {ratios[part]:.2f} of native, goal {GOAL}")
    if check and missed:
        raise typer.Exit(1)


def profiled(directory: str, dtype: str) -> None:
    """Start an engine in this process, and print polyshard's functions by cumulative time."""
    starting = start(ENGINES["polyshard"], directory, Options(dtype))
    profile = cProfile.Profile()
    profile.enable()
    starting()
    profile.disable()
    pstats.Stats(profile).sort_stats("cumulative").print_stats(r"/polyshard/(?!.*site-packages)", 20)


if __name__ == "__main__":
    typer.run(main)
