"""Reports of benchmarks: print one table, append each row to a file when it is measured, and write all as JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass
class Report:
    """The rows of one benchmark.

    Attributes:
        columns: the keys of a row that the table shows, in order.
        lines: file to which each row is appended as one line of JSON as soon as it is measured.
        rows: the rows so far.
        missed: the goals that were missed, one sentence each.
    """

    columns: Sequence[str]
    lines: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        """Add a row, and append it to `lines`."""
        self.rows.append(row)
        if self.lines is not None:
            with self.lines.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def show(self) -> None:
        """Print the table and every missed goal."""
        table = Table(*self.columns)
        for row in self.rows:
            table.add_row(*(_text(row.get(column)) for column in self.columns))
        Console(width=None if sys.stdout.isatty() else 150).print(table)
        for line in self.missed:
            print("missed:", line)

    def save(self, file: Path | None, device: torch.device) -> None:
        """Write rows, machine and versions to a JSON file; None writes nothing."""
        if file is not None:
            figures = {"machine": machine(device), "rows": self.rows, "missed": self.missed}
            file.write_text(json.dumps(figures, indent=2) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """Return the processor or GPU that was measured, and the versions of the libraries involved."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "python": platform.python_version(), "torch": torch.__version__}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
