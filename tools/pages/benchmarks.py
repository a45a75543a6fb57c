"""Tables of the results that benchmarks have written to benchmarks/results/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tools.pages.tables import markdown

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def tables() -> dict[str, Callable[[], str]]:
    return {f"results of {path.stem}": lambda path=path: table(path) for path in sorted(RESULTS.glob("*.json"))}


def table(path: Path) -> str:
    figures = json.loads(path.read_text())
    rows, machine = figures["rows"], figures["machine"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("device", "python"))
    command = f", measured by `{figures['command']}`" if "command" in figures else ""
    text = markdown(columns, ((_cell(row.get(column)) for column in columns) for row in rows))
    return f"{text}\n{machine['device']}, Python {machine['python']}, {versions}{command}.\n"


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
