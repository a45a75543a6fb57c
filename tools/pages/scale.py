"""Tables of plans: how memory, communication and time grow with the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polyshard as ps
from polyshard.planning.strategy import CASTS, MASTERS
from tools.pages.tables import markdown

GIB = 2**30
LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
}
SMALL = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LARGE = {**LLAMA, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
LARGE |= {"num_attention_heads": 128}
COLUMNS = (
    "GPUs",
    "layout",
    "sharding",
    "adapters",
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "in transit",
    "total",
)
TIMES = ("GPUs", "layout", "sharding", "GB sent by axis", "compute", "waits", "bubble", "s/step", "MFU", "bottleneck")


def small() -> list[tuple[int, list[ps.PlannedLayout]]]:
    """Return the plans of an 8B model, 4M tokens a step, with data parallel alone and with tensor parallel."""
    traces: dict[Any, Any] = {}
    found = []
    for gpus in (2, 8, 64, 512, 4096):
        layouts = [ps.ParallelLayout(data=gpus)] if gpus <= 512 else []
        if gpus >= 8:
            layouts.append(ps.ParallelLayout(tensor=8, data=gpus // 8, sequence_parallel=True))
        for layout in layouts:
            plan = ps.plan(
                SMALL,
                cluster=ps.Cluster(gpus=gpus, memory=80 * GIB, reserve=0),
                tokens_per_step=2**22,
                sequence_length=8192,
                layout=layout,
                shardings=("data", "zero1", "fsdp"),
                precisions=(MASTERS, CASTS),
                recompute=("full",),
                traces=traces,
            )
            found.append((gpus, [*plan.layouts, *plan.too_large]))
    return found


def large() -> list[tuple[int, list[ps.PlannedLayout]]]:
    """Return the plans of a 405B model, 16M tokens a step, with and without a pipeline of 16 stages."""
    traces: dict[Any, Any] = {}
    found = []
    for gpus in (1024, 2048, 8192, 16384):
        for pipeline, sharding in ((1, "fsdp"), (16, "zero1")):
            layout = ps.ParallelLayout(tensor=8, pipeline=pipeline, data=gpus // 8 // pipeline, sequence_parallel=True)
            plan = ps.plan(
                LARGE,
                cluster=ps.Cluster(gpus=gpus, memory=80 * GIB, reserve=0),
                tokens_per_step=2**24,
                sequence_length=8192,
                layout=layout,
                unsupported=True,
                shardings=(sharding,),
                precisions=(MASTERS, CASTS) if sharding == "zero1" else (CASTS,),
                recompute=("full",),
                traces=traces,
            )
            shown = [p for p in (*plan.layouts, *plan.too_large) if p.strategy.precision.casts == (sharding == "fsdp")]
            found.append((gpus, shown))
    return found


def memory(plans: list[tuple[int, list[ps.PlannedLayout]]]) -> str:
    """Return GiB of a rank by kind."""
    rows = []
    for gpus, layouts in plans:
        for planned in layouts:
            kinds = planned.memory
            amounts = (kinds.parameters, kinds.gradients, kinds.optimizer, kinds.activations, kinds.communication)
            told = [f"{nbytes / GIB:.1f}" for nbytes in (*amounts, kinds.total)]
            rows.append((gpus, planned.strategy.sizes, planned.strategy.sharding, ", ".join(planned.adapters), *told))
    return markdown(COLUMNS, rows)


def time(plans: list[tuple[int, list[ps.PlannedLayout]]]) -> str:
    """Return what a rank sends in a step, and the parts of the step's predicted time."""
    rows = []
    for gpus, layouts in plans:
        for planned in layouts:
            seconds = planned.time
            sent = ", ".join(f"{axis} {nbytes / 1e9:.3g}" for axis, nbytes in planned.sent.items() if nbytes)
            waits = sum(seconds.communication.values())
            parts = [f"{part:.2f}" for part in (seconds.compute, waits, seconds.bubble, seconds.total)]
            what = (gpus, planned.strategy.sizes, planned.strategy.sharding, sent)
            rows.append((*what, *parts, f"{planned.utilization:.0%}", seconds.bottleneck))
    return markdown(TIMES, rows)


class Tables:
    """The tables, whose plans are made once."""

    def __init__(self) -> None:
        self._plans: dict[str, Any] = {}

    def _of(self, name: str) -> Any:
        if name not in self._plans:
            self._plans[name] = {"small": small, "large": large}[name]()
        return self._plans[name]

    def all(self) -> dict[str, Any]:
        """Return each table's name and function."""
        return {
            f"scale of the {name} model: {what}": lambda name=name, make=make: make(self._of(name))
            for name in ("small", "large")
            for what, make in (("memory", memory), ("time", time))
        }


def tables() -> dict[str, Any]:
    return Tables().all()
