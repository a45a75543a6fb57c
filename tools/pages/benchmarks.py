"""Tables of the results that benchmarks have written to benchmarks/results/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tools.pages.tables import markdown

TITLES = {"python": "Python", "ray": "Ray", "vllm": "vLLM"}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def tables() -> dict[str, Callable[[], str]]:
    return {f"results of {path.stem}": lambda path=path: table(path) for path in sorted(RESULTS.glob("*.json"))}


def table(path: Path) -> str:
    figures = json.loads(path.read_text())
    rows, machine = figures["rows"], figures["machine"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    versions = [f"{TITLES.get(name, name)} {value}" for name, value in machine.items() if name != "device"]
    told = ", ".join([machine["device"], *versions])
    note = f"; {figures['note']}" if "note" in figures else ""
    commands = figures.get("command", [])
    lines = [commands] if isinstance(commands, str) else commands
    block = "\n```bash\n" + "\n".join(lines) + "\n```\n" if lines else ""
    text = markdown(columns, ((_cell(row.get(column)) for column in columns) for row in rows))
    return f"{text}\n{told}{note}.\n{block}"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
