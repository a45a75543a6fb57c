"""Saving, loading and fingerprinting a model's weights on their device, against a device copy and plain safetensors.

    python benchmarks/checkpoints.py [MODEL] [--device cuda] [--dtype bfloat16] [--json FILE] [--check]

MODEL is a shape of `benchmarks/training.py`. Each round runs the plain operation and then polyshard's; the ratio is
polyshard's median throughput over the plain operation's. Plain safetensors neither verifies what it reads nor waits for
the disk, so the save is also compared with one file that is written and synced. `--check` exits with status 1 if the
loaded weights differ in any bit, or if loading, verified or not, is below half of safetensors' throughput.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import typer
from decoder import build_model
from report import Report
from rich.progress import track
from safetensors.torch import load_file, save_file
from timing import alternating
from training import SHAPES

import polyshard as ps
from polyshard.weights.fingerprint import fingerprint

GOAL = 0.5


def main(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-0.6b",
    device: Annotated[str, typer.Option(help="cuda or cpu; default cuda if there is one.")] = "",
    dtype: str = "bfloat16",
    rounds: int = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if a goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = Report(("model", "what", "GB/s", "against", "plain GB/s", "ratio"), lines)
    context = ps.initialize("torch", device=where)
    config = ps.ModelConfig(**SHAPES[model])
    decoder = build_model(config, context)
    ps.initialize_weights(decoder, context, seed=0)
    decoder.to(getattr(torch, dtype))
    weights = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    copies = {name: torch.empty_like(weight) for name, weight in weights.items()}
    nbytes = sum(weight.nbytes for weight in weights.values())
    work = Path(tempfile.mkdtemp(prefix="polyshard-bench-"))
    try:
        cases = _cases(decoder, context, config, weights, copies, work)
        for what, against, ours, plain in track(cases, "measuring", transient=True):
            times = alternating({"plain": plain, "ours": ours}, where, rounds)
            speeds = {name: nbytes / spent / 1e9 for name, spent in times.items()}
            row = {"GB/s": speeds["ours"], "against": against, "plain GB/s": speeds["plain"]}
            report.add(model=model, what=what, **row, ratio=speeds["ours"] / speeds["plain"])
            if what.startswith("load") and speeds["ours"] < GOAL * speeds["plain"]:
                report.missed.append(f"{what}: {speeds['ours'] / speeds['plain']:.2f} of {against}, not {GOAL}")
        before = {name: weight.clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.zero_()
        ps.load_checkpoint(decoder, work / "saved", context)
        different = [name for name, weight in weights.items() if not torch.equal(weight, before[name])]
        if different:
            report.missed.append(f"loaded with other bits than were saved: {', '.join(different[:3])}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
        ps.shutdown(context)
    report.show()
    report.save(json_file, where)
    if check and report.missed:
        sys.exit(1)


def _cases(
    decoder: Any, context: Any, config: Any, weights: Any, copies: Any, work: Path
) -> list[tuple[str, str, Callable[[], Any], Callable[[], Any]]]:
    """Return the name of each measurement, the name of its reference, and both as functions."""

    def copy() -> None:
        for name, weight in weights.items():
            copies[name].copy_(weight)

    def fingerprints() -> list[Any]:
        return [fingerprint(weight) for weight in weights.values()]

    def write_plain() -> None:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, work / "plain.safetensors")

    def write_synced() -> None:
        write_plain()
        with (work / "plain.safetensors").open("rb+") as file:
            os.fsync(file.fileno())

    def read_plain() -> None:
        for name, value in load_file(work / "plain.safetensors").items():
            weights[name].copy_(value)

    def save() -> None:
        ps.save_checkpoint(decoder, work / "saved", context, config=config)

    return [
        ("fingerprints", "device copy", fingerprints, copy),
        ("save", "safetensors", save, write_plain),
        ("save", "safetensors, synced", save, write_synced),
        ("load, verified", "safetensors", lambda: ps.load_checkpoint(decoder, work / "saved", context), read_plain),
        (
            "load, verify=False",
            "safetensors",
            lambda: ps.load_checkpoint(decoder, work / "saved", context, verify=False),
            read_plain,
        ),
    ]


if __name__ == "__main__":
    typer.run(main)
