"""`python -m tools.gpu_check collect` prepares the check, `run` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tools.gpu_check import collect as collecting
from tools.gpu_check.runner import only_failed, run_steps
from tools.gpu_check.steps import STEPS, named

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def collect() -> None:
    """Collect wheels for a GPU machine without network, and print the command to run there."""
    collecting.collect()
    collecting.report()


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl, table.txt and log.txt.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu for the rehearsal at small sizes.")] = "cuda",
    only: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(step.name for step in STEPS)}.")] = "",
    failed: Annotated[Path | None, typer.Option(help="results.jsonl of an earlier run: run again what failed.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for all steps.")] = 540.0,
) -> None:
    """Run the steps in order of value, each within its own time.

    Status 1 unless all of them passed; in the rehearsal a step may be skipped, if this machine lacks a library.
    """
    if device not in ("cuda", "cpu"):
        raise SystemExit(f"--device is unsupported: got {device!r}, expected cuda or cpu")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("this machine has no CUDA device: use --device cpu for the rehearsal")
    steps = named([name for name in only.split(",") if name])
    if failed is not None:
        steps = only_failed(steps, failed)
    python_files = collecting.PYTHON_FILES if collecting.PYTHON_FILES.exists() else None
    outcomes = run_steps(steps, device, out, budget, python_files)
    print((out / "table.txt").read_text() if outcomes else "nothing failed")
    good = ("passed",) if device == "cuda" else ("passed", "skipped")
    sys.exit(any(outcome.status not in good for outcome in outcomes))


if __name__ == "__main__":
    app()
