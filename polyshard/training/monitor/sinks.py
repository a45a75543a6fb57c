"""Where records go: a terminal, a file of JSON lines, TensorBoard.

Each opens its target at the first record, so that a rank that writes none touches no file. A run that was killed and is
resumed does some steps again: the first record replaces those of its own step and of later ones.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

from polyshard.core.errors import ConfigurationError, MissingDependencyError
from polyshard.training.monitor.record import StepRecord

logger = logging.getLogger(__name__)


class JsonLines:
    """Append each record to a file, as one line of JSON.

    JSON has no numbers that are not finite, such as the gradient norm of a skipped step: they are written as the
    strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which Python's `float` reads.

    Args:
        path: the file; folders that do not exist are created.

    Examples:
        >>> sink = JsonLines("run/steps.jsonl")
        >>> sink(ps.StepRecord(step=1, loss=2.5))
        >>> sink.close()
        >>> import json
        >>> json.loads(open("run/steps.jsonl").readline())["loss"]
        2.5
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: TextIO | None = None

    def __call__(self, record: StepRecord) -> None:
        """Write a record; it is in the file even if the process is then killed."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _keep_before(self._path, record.step)
            self._file = self._path.open("a")
        self._file.write(json.dumps(_finite(asdict(record)), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _finite(value: Any) -> Any:
    """Return figures with strings for numbers that are not finite, as Protocol Buffers writes them to JSON."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _keep_before(path: Path, step: int) -> None:
    """Drop lines of `step` and later steps, and a last line that a kill left incomplete."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = list(takewhile(lambda line: line.endswith("\n") and _step_of(line, path) < step, lines))
    replaced = sum(line.endswith("\n") for line in lines[len(kept) :])
    if replaced:
        logger.warning("%s holds records of step %s and later: %s are replaced", path, step, replaced)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text("".join(kept))
    part.replace(path)


def _step_of(line: str, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise ConfigurationError(
            f"{path} holds other lines than records: got {line[:40]!r}, expected JSON with a step. Name another file."
        ) from None


class TensorBoard:
    """Write each record's figures as scalars for TensorBoard, by `torch.utils.tensorboard`.

    Args:
        directory: the log directory.

    Raises:
        MissingDependencyError: the package tensorboard is not installed.

    Examples:
        >>> sink = TensorBoard("run/tensorboard")
        >>> sink(ps.StepRecord(step=1, loss=2.5))
        >>> sink.close()
    """

    def __init__(self, directory: str | Path) -> None:
        if find_spec("tensorboard") is None:
            raise MissingDependencyError("TensorBoard is not installed. Install it with: pip install tensorboard")
        self._directory = str(directory)
        self._writer: Any = None

    def __call__(self, record: StepRecord) -> None:
        """Write a record."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides what an earlier run of this directory wrote from this step on.
            self._writer = SummaryWriter(self._directory, purge_step=record.step)
        for name, value in record.figures().items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Close the log."""
        if self._writer is not None:
            self._writer.close()


class ProgressBar:
    """Show steps, loss, speed and gradient norm in the terminal, with rich; print lines if there is none.

    Args:
        steps: the number of steps of the run.
        every: steps between two lines, if the output is no terminal.

    Examples:
        >>> sink = ProgressBar(8)
        >>> sink(ps.StepRecord(step=1, loss=2.5, tokens_per_second=192.0))  # doctest: +ELLIPSIS
        step   1/8  loss 2.500  192 tokens/s
        >>> sink.close()
    """

    def __init__(self, steps: int, every: int = 8) -> None:
        self._steps, self._every = steps, every
        self._bar: Any = None

    def __call__(self, record: StepRecord) -> None:
        """Show a record."""
        if self._bar is None:
            self._bar = self._open(record.step - 1)
        line = _line(record)
        self._bar.update(self._bar.task_ids[0], completed=record.step, line=line)
        if not self._bar.console.is_terminal and (
            record.step % self._every == 1 % self._every or record.step == self._steps
        ):
            print(f"step {record.step:3d}/{self._steps}  {line}", flush=True)

    def _open(self, completed: int) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"))
        bar = Progress(*text, TimeRemainingColumn())
        bar.disable = not bar.console.is_terminal
        bar.add_task("training", total=self._steps, completed=completed, line="")
        bar.start()
        return bar

    def close(self) -> None:
        """Release the terminal."""
        if self._bar is not None:
            self._bar.stop()


def _line(record: StepRecord) -> str:
    parts = [] if record.loss is None else [f"loss {record.loss:.3f}"]
    parts.append(f"{record.tokens_per_second:.0f} tokens/s")
    if record.grad_norm is not None:
        parts.append(f"gradient norm {record.grad_norm:.2f}")
    if record.utilization is not None:
        parts.append(f"MFU {record.utilization:.1%}")
    if record.skipped:
        parts.append("skipped")
    return "  ".join(parts)
