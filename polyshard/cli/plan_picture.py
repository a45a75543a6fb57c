"""The picture of `polyshard plan`: memory by kind and time by part of each layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyshard.core.errors import MissingDependencyError
from polyshard.planning.result import Plan

_GIB = 2**30


def draw(plan: Plan, path: Path, top: int) -> None:
    """Write the picture of the layouts that fit, and of the smallest that do not, to a file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingDependencyError("--picture needs matplotlib. Install it: pip install matplotlib") from None
    shown = [*plan.layouts[:top], *plan.too_large[: max(0, top - len(plan.layouts))]]
    names = [str(planned.strategy) for planned in shown]
    figure: Any = Figure(figsize=(14, 1.5 + 0.35 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, names, [{k: v / _GIB for k, v in asdict(planned.memory).items()} for planned in shown])
    left.axvline(plan.cluster.memory / _GIB, color="black", linestyle="--")
    left.set_xlabel("GiB of a GPU")
    parts = []
    for planned in shown:
        time = planned.time
        sides = {"bubble": time.bubble, "optimizer": time.optimizer}
        parts.append({"compute": time.compute, **time.communication, **sides})
    _bars(right, names, parts)
    right.set_xlabel("predicted seconds of a step")
    left.invert_yaxis()
    figure.savefig(path)


def _bars(axes: Any, names: list[str], rows: list[dict[str, float]]) -> None:
    starts = [0.0] * len(names)
    for kind in dict.fromkeys(kind for row in rows for kind in row):
        widths = [row.get(kind, 0.0) for row in rows]
        axes.barh(range(len(names)), widths, left=starts, label=kind)
        starts = [start + width for start, width in zip(starts, widths)]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.legend(fontsize=8)
