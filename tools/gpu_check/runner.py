"""Run the steps one after the other; what each has measured is on disk even if the whole run is cut short."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.gpu_check.steps import LINES, Step

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        step: its name.
        status: `passed`, `failed`, `skipped` (every test was), `timed out` or `not run` (the budget was spent).
        seconds: it took.
        rows: what it measured.
    """

    step: str
    status: str
    seconds: float
    rows: Sequence[dict[str, Any]]


def run_steps(steps: Sequence[Step], device: str, out: Path, budget: float, python_files: Path | None) -> list[Outcome]:
    """Run `steps` within `budget` seconds.

    Writes to the folder `out`: `results.jsonl`, one line for each row and one for each step's end; `current.jsonl`, the
    rows of the step that is running; `log.txt`, what the commands print; `table.txt`, rewritten after every step.

    Args:
        steps: in the order to run.
        device: `cuda` or `cpu`.
        out: is made if it does not exist.
        budget: seconds for all steps; a step that would start after them is not run.
        python_files: zip archive of vLLM's Python files, for the steps that need them; None if there is none.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        if python_files is not None:
            with zipfile.ZipFile(python_files) as archive:
                archive.extractall(folder)
        _run_all(steps, device, out, deadline, Path(folder), outcomes)
    return outcomes


def _run_all(
    steps: Sequence[Step], device: str, out: Path, deadline: float, vllm_files: Path, outcomes: list[Outcome]
) -> None:
    for step in steps:
        left = deadline - time.monotonic()
        outcome = Outcome(step.name, "not run", 0.0, ())
        if left > 0:
            print(f"--- {step.title} (at most {min(step.seconds, left):.0f} s)", flush=True)
            outcome = _run(step, device, out, min(step.seconds, left), vllm_files)
        outcomes.append(outcome)
        _append(out / "results.jsonl", outcome)
        (out / "current.jsonl").unlink(missing_ok=True)
        summary = table_of(outcomes, steps)
        with (out / "table.txt").open("w") as file:
            Console(file=file, width=150).print(*summary, sep="\n")
        print(f"    {outcome.status} in {outcome.seconds:.0f} s", flush=True)


def _run(step: Step, device: str, out: Path, seconds: float, vllm_files: Path) -> Outcome:
    lines = out / "current.jsonl"
    lines.unlink(missing_ok=True)
    command = [str(lines) if part == LINES else part for part in (step.cuda if device == "cuda" else step.cpu)]
    started = time.monotonic()
    with (out / "log.txt").open("a") as log:
        log.write(f"\n=== {step.name}: {' '.join(command)}\n")
        log.flush()
        environment = _environment(step, vllm_files if step.needs_vllm_files and device == "cuda" else None)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:  # children that outlive the command, too
            _kill_group(process.pid)
            process.wait()
    rows = tuple(json.loads(line) for line in lines.read_text().splitlines()) if lines.exists() else ()
    if status == "passed" and not rows:
        status = "failed"  # a step that measured nothing has verified nothing
    if status == "passed" and all(row.get("outcome") == "skipped" for row in rows):
        status = "skipped"
    return Outcome(step.name, status, time.monotonic() - started, rows)


def _environment(step: Step, vllm_files: Path | None) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if vllm_files is not None:
        paths.append(str(vllm_files))  # last: an installed vLLM comes first
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        **step.environment,
    }


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _append(file: Path, outcome: Outcome) -> None:
    with file.open("a") as results:
        for row in outcome.rows:
            results.write(json.dumps({"step": outcome.step, **row}) + "\n")
        end = {"step": outcome.step, "end": outcome.status, "duration": round(outcome.seconds, 1)}
        results.write(json.dumps(end) + "\n")


def only_failed(steps: Sequence[Step], results: Path) -> tuple[Step, ...]:
    """Return the steps of an earlier run that did not pass; of pytest's steps only the tests that did not pass."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    again = []
    for step in steps:
        mine = [row for row in rows if row["step"] == step.name]
        ends = [row["end"] for row in mine if "end" in row]
        if ends and ends[-1] == "passed":
            continue
        failed = [row["test"] for row in mine if row.get("outcome") == "failed"]
        if step.tests and failed and ends and ends[-1] == "failed":
            files = [index for index, part in enumerate(step.cuda) if part.startswith("tests/")]
            step = replace(step, cuda=(*step.cuda[: files[0]], *failed))
        again.append(step)
    return tuple(again)


def table_of(outcomes: Sequence[Outcome], steps: Sequence[Step]) -> list[Any]:
    """The steps as a table, then the rows of each measurement and the tests that failed."""
    titles = {step.name: step.title for step in steps}
    table = Table("step", "what", "result", "s", "rows")
    parts: list[Any] = [table]
    for outcome in outcomes:
        counts = Counter(row["outcome"] for row in outcome.rows if "outcome" in row)
        rows = ", ".join(f"{count} {name}" for name, count in counts.items()) or str(len(outcome.rows))
        table.add_row(outcome.step, titles[outcome.step], outcome.status, f"{outcome.seconds:.0f}", rows)
        failed = [row for row in outcome.rows if row.get("outcome") == "failed"]
        if failed:
            parts.append(_failures(outcome.step, failed))
        elif outcome.rows and not counts:
            parts.append(_figures(outcome))
        if counts.get("skipped"):
            parts.append(_skips(outcome))
    return parts


def _failures(step: str, failed: Sequence[dict[str, Any]]) -> Table:
    table = Table("test", "reason", title=f"{step}: failed")
    for row in failed:
        table.add_row(escape(row["test"]), escape(str(row.get("reason", ""))[:400]))
    return table


def _skips(outcome: Outcome) -> Table:
    counts = Counter(row.get("reason", "") for row in outcome.rows if row.get("outcome") == "skipped")
    table = Table("skipped", "reason", title=f"{outcome.step}: skipped")
    for reason, count in counts.most_common():
        table.add_row(str(count), escape(reason[:200]))
    return table


def _figures(outcome: Outcome) -> Table:
    columns = list(dict.fromkeys(key for row in outcome.rows for key in row))
    table = Table(*columns, title=outcome.step)
    for row in outcome.rows:
        values = (row.get(column) for column in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else escape(str(value)) for value in values))
    return table
