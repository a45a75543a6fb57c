"""The tables of `polyshard plan`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from polyshard.planning.result import Plan, PlannedLayout
from polyshard.planning.strategy import LETTERS

_GIB = 2**30
_KINDS = {"parameters": "blue", "gradients": "cyan", "optimizer": "green", "activations": "yellow"}
_KINDS |= {"communication": "magenta", "reserve": "white"}
_WIDTH = 24


def show(plan: Plan, top: int) -> None:
    """Print the layouts, those that do not fit, and why others are impossible."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(f"{plan.parameters / 1e9:.2f} billion parameters, {plan.cluster.gpus} GPUs", style="bold")
    if plan.layouts:
        shown = plan.layouts[:top]
        console.print(_table(f"fastest {len(shown)} of {len(plan.layouts)} layouts that fit", shown, plan))
    if plan.too_large:
        smallest = plan.too_large[: max(3, 0 if plan.layouts else top)]
        console.print(_table(f"do not fit: {len(plan.too_large)}, the smallest", smallest, plan))
    if plan.serving:
        console.print(_serving(plan))
    if plan.refused:
        console.print("impossible or unsupported:", style="bold")
        for reason, count in sorted(plan.refused.items(), key=lambda item: -item[1]):
            console.print(f"  {reason}" + (f" ({count} strategies)" if count > 1 else ""), markup=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    cluster = plan.cluster
    console.print(
        f"Times assume {cluster.efficiency:.0%} of {cluster.peak_flops / 1e12:.0f} TFLOP/s while a rank computes, and "
        f"{cluster.link_efficiency:.0%} of nvlink={cluster.nvlink:g} (both directions), net={cluster.net:g} GB/s.",
        style="dim",
    )


def _table(title: str, found: Iterable[PlannedLayout], plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("layout", "sharding", "precision", "recompute", "micro"):
        table.add_column(column, no_wrap=True)
    table.add_column("GiB", justify="right")
    table.add_column("memory by kind", min_width=_WIDTH)
    for column in ("GB sent by axis", "s/step", "MFU", "limit", "adapters"):
        table.add_column(column)
    for planned in found:
        strategy = planned.strategy
        sent = ", ".join(f"{axis} {nbytes / 1e9:.3g}" for axis, nbytes in planned.sent.items() if nbytes)
        table.add_row(
            strategy.sizes,
            strategy.sharding,
            strategy.dtypes,
            strategy.recompute,
            f"{strategy.micro_batches} x {strategy.rows}",
            f"{planned.memory.total / _GIB:.1f}",
            bar(planned, plan.cluster.memory),
            sent,
            f"{planned.time.total:.3g}",
            f"{planned.utilization:.0%}",
            planned.time.bottleneck,
            ", ".join(planned.adapters) or "none yet",
        )
    legend = "  ".join(f"[{color}]█[/{color}] {kind}" for kind, color in _KINDS.items())
    table.caption = f"{legend}; the bar is {plan.cluster.memory / _GIB:.0f} GiB. {LETTERS}"
    return table


def bar(planned: PlannedLayout, memory: int) -> str:
    """Return a bar of the memory by kind, as markup."""
    scale = _WIDTH / max(memory, planned.memory.total)
    text, drawn, so_far = "", 0, 0.0
    for kind, nbytes in asdict(planned.memory).items():
        so_far += nbytes * scale
        cells = round(so_far) - drawn
        drawn += cells
        text += f"[{_KINDS[kind]}]{'█' * cells}[/{_KINDS[kind]}]" if cells else ""
    return text + "·" * (_WIDTH - drawn)


def _serving(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title="serving", title_justify="left")
    for column in ("tensor", "engines", "weights GiB", "KV cache tokens", "sequences", "ms/step", "tokens/s", ""):
        table.add_column(column, justify="right")
    for found in plan.serving:
        speed = (f"{found.decode_seconds * 1e3:.3g}", f"{found.tokens_per_second:.3g}") if found.fits else ("", "")
        table.add_row(
            str(found.tensor),
            str(found.engines),
            f"{found.weights / _GIB:.1f}",
            str(found.cache_tokens),
            str(found.sequences),
            *speed,
            "" if found.fits else "does not fit",
        )
    table.caption = "upper bounds: bytes that a decoding step reads and sends, at full cache"
    return table
