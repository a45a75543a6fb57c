"""A pytest plugin: one line of JSON for each test, as soon as it has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path, help="append one line of JSON per test to this file")


class _Writer:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's call, or its setup where that did not pass."""
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        row |= dict(report.user_properties)
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            row["reason"] = report.longrepr[2].removeprefix("Skipped: ")
        elif report.outcome == "failed":
            row["reason"] = _reason(report)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.outcome == "failed":
            with self.file.open("a") as file:
                file.write(json.dumps({"test": report.nodeid, "outcome": "failed", "reason": _reason(report)}) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that collects the results writes them, not xdist's workers."""
    file = config.getoption("--lines")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(file))


def _reason(report: Any) -> str:
    """The lines that pytest marks as the error; the end of the traceback where it marks none."""
    text = str(report.longrepr)
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E")]
    return ("\n".join(marked) or text)[-1500:]
