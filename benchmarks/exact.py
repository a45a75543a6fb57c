"""The cost of exact mode: serving and a training step, relative to the ordinary mode.

    python benchmarks/exact.py [MODEL] [--dtype bfloat16] [--json FILE] [--check]

Serving uses the loads and processes of `benchmarks/serving.py`, for the same registered model in both modes. Training
is forward pass, log-probabilities, backward pass and optimizer step of packed sequences on the torch adapter,
alternating in one process. Reports ratios of medians; below 1.00 exact mode is faster. `--check` exits with status 1 if
a ratio is above 1.3.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import serving
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import polyshard as ps

GOAL = 1.3
STEPS = {"8 x 128 tokens": (128,) * 8, "2 x 512 tokens": (512,) * 2}


def main(
    model: Annotated[str, typer.Argument(help="Directory of a Llama-class model.")] = "",
    dtype: str = "bfloat16",
    tensor_parallel: Annotated[int, typer.Option(help="Of the served model.")] = 1,
    rounds: int = 3,
    restarts: Annotated[int, typer.Option(help="Sets of serving processes.")] = 2,
    steps: Annotated[int, typer.Option(help="Training steps of each mode, after one to warm up.")] = 5,
    threads: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 where the goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    names = ["polyshard", "exact"]
    options = serving.Options(dtype, tensor_parallel, threads=threads)
    times, started = serving.measure(names, model, options, rounds, restarts)
    seconds: dict[str, dict[str, list[float]]] = {
        f"serving, {load.name}": {name: times[name][load.name] for name in names} for load in serving.LOADS
    }
    seconds["engine start"] = started
    with tempfile.TemporaryDirectory() as scratch:
        directory = serving.prepare(model, Path(scratch))
        seconds |= {f"training, {name}": step for name, step in training(directory, dtype, steps, threads).items()}
    table = Table("", "ordinary", "exact", "ratio", title=f"the cost of exact mode ({dtype}); medians")
    ratios, missed = {}, []
    for name, by_mode in seconds.items():
        ordinary, exact = (statistics.median(by_mode[mode]) for mode in names)
        ratios[name] = exact / ordinary
        table.add_row(name, f"{1000 * ordinary:.0f} ms", f"{1000 * exact:.0f} ms", f"{ratios[name]:.2f}")
        if ratios[name] > GOAL:
            missed.append(f"{name}: {ratios[name]:.2f}, goal {GOAL}")
    Console(width=100).print(table)
    for line in missed:
        print("missed:", line)
    if json_file is not None:
        json_file.write_text(json.dumps({"dtype": dtype, "ratios": ratios, "seconds": seconds}, indent=2))
    if check and missed:
        raise typer.Exit(1)


def training(directory: Path, dtype: str, steps: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of training steps in each mode, alternating."""
    sys.path.insert(0, str(serving.EXAMPLES))
    import decoder

    torch.set_num_threads(threads)
    config = ps.read_config(directory)
    trainers: dict[str, tuple[Any, Any]] = {}
    for name, settings in (("polyshard", {}), ("exact", {"exact": True})):
        context = ps.initialize("torch", **settings)
        model = decoder.build_model(config, context)
        ps.load_checkpoint(model, directory, context)
        model.to(getattr(torch, dtype))
        trainers[name] = ps.load_adapter("torch").engine(model, ps.AdamW(lr=1e-6), context, max_grad_norm=1.0), context
    found = {}
    for load, lengths in STEPS.items():
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        ids = torch.randint(config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        found[load] = {name: [] for name in trainers}
        for index in track(range(steps + 1), f"training, {load}"):
            for name, (trainer, context) in trainers.items():
                before = time.perf_counter()
                logits = trainer.module.compute_logits(trainer(ids, cu_seqlens=bounds))
                loss = -ps.token_logprobs(logits[:-1], ids[1:], context, vocab_size=config.vocab_size).mean()
                trainer.backward(loss)
                trainer.step()
                if index:
                    found[load][name].append(time.perf_counter() - before)
    return found


if __name__ == "__main__":
    typer.run(main)
