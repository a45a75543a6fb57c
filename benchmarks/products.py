"""The native matmul against vLLM's on this CPU, for all linear layers of SmolLM2-135M, by number of rows.

    python benchmarks/products.py [--dtype float32] [--threads 1] [--json FILE] [--check]

Both use packed weights, more than fit into the caches, and alternate. Reports ratios of medians; above 1.00 the native
matmul is faster. `--check` exits with status 1 if engines on this machine use the native matmul for this dtype and a
ratio is below 0.95.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F
from vllm.platforms import current_platform

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.layers.matmul import select_matmul
from polyshard.native.matmul import PackedProduct, unsupported_reason

LAYERS = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # [out, in]: qkv, output, gate and up, down
DEPTH = 30
ROWS = (1, 2, 4, 8, 16, 24, 32, 128, 512, 2048)
GOAL = 0.95


def main(
    dtype: str = "float32",
    threads: int = 1,
    rounds: Annotated[int, typer.Option(help="Of each product, after one to warm up.")] = 7,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 where the goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    torch.set_num_threads(threads)
    current_platform.import_kernels()
    kind: torch.dtype = getattr(torch, dtype)
    if (reason := unsupported_reason(kind)) is not None:
        raise typer.BadParameter(f"the compiled product {reason}")
    weights = [torch.randn(shape).to(kind) / shape[1] ** 0.5 for shape in LAYERS * DEPTH]
    packed = compat.has_packed_matmul(kind)
    theirs = "vLLM's packed product" if packed else "F.linear, vLLM's way without one"
    sides: dict[str, list[Callable[[torch.Tensor], Any]]] = {
        "native": [PackedProduct(weight) for weight in weights],
        theirs: [compat.cpu_packed_matmul(w) if packed else lambda x, w=w: F.linear(x, w) for w in weights],
    }
    operations = sum(2 * weight.numel() for weight in weights)
    table = Table(title=f"{dtype}, {threads} thread(s), {torch.backends.cpu.get_cpu_capability()}; medians")
    for column in ("rows", *(f"{name}, GFLOP/s" for name in sides), "ratio"):
        table.add_column(column, justify="right")
    ratios = {}
    for rows in track(ROWS, "rows"):
        x = {size: torch.randn(rows, size).to(kind) for _, size in LAYERS}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for index in range((rounds if rows < 512 else 2) + 1):
            for name, products in sides.items():
                before = time.perf_counter()
                for weight, product in zip(weights, products):
                    product(x[weight.shape[1]])
                if index:
                    seconds[name].append(time.perf_counter() - before)
        medians = [statistics.median(times) for times in seconds.values()]
        ratios[rows] = medians[1] / medians[0]
        table.add_row(str(rows), *(f"{operations * rows / t / 1e9:.1f}" for t in medians), f"{ratios[rows]:.2f}")
    Console(width=120).print(table)
    print(f"an engine here multiplies {dtype} by: {select_matmul(kind)}")
    if json_file is not None:
        json_file.write_text(json.dumps({"dtype": dtype, "threads": threads, "ratios": ratios}, indent=2))
    if check and select_matmul(kind) == "native" and min(ratios.values()) < GOAL:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
