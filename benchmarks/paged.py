"""Attention over vLLM's paged cache on this CPU: the native kernel against vLLM's kernel, on the same pages.

    python benchmarks/paged.py [--dtype bfloat16] [--threads 1] [--json FILE] [--check]

Both alternate. Reports ratios of medians; above 1.00 the native kernel is faster. `--check` exits with status 1 if it
is slower.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import _custom_ops as operators

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.attention.native import pages_of
from polyshard.adapters.vllm.compat.paging import Blocks
from polyshard.attention.kernels.cpu import native_paged as paged
from polyshard.core.attention import AttentionSpec
from polyshard.native.build import KINDS

HEADS = {"9 heads of 64, 3 for keys": (9, 3, 64), "32 heads of 128, 8 for keys": (32, 8, 128)}
REQUESTS = {
    "decoding, 16 requests of 40 tokens": (16, 1, 40),
    "decoding, 8 requests of 385 tokens": (8, 1, 385),
    "decoding, 4 requests of 4096 tokens": (4, 1, 4096),
    "4 tokens at once (speculation), of 2048": (1, 4, 2048),
    "new prompts, 5 of 384 tokens": (5, 384, 384),
    "a later chunk, 256 tokens of 384": (1, 256, 384),
    "a later chunk, 512 tokens of 4096": (1, 512, 4096),
}
PAGE = 128  # vLLM's default on CPU
GOAL = 1.0


@dataclass(frozen=True)
class Case:
    """Requests over one layer's cache. `ours` and `theirs` write to `out` `[tokens, heads, dim]`."""

    operations: int
    ours: Callable[[torch.Tensor], None]
    theirs: Callable[[torch.Tensor], None]
    out: torch.Tensor


def main(
    dtype: str = "bfloat16",
    threads: int = 1,
    rounds: Annotated[int, typer.Option(help="Of each, after one to warm up.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 where the goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    torch.set_num_threads(threads)
    kind: torch.dtype = getattr(torch, dtype)
    if kind not in KINDS:
        raise typer.BadParameter(f"dtype is {', '.join(str(d).removeprefix('torch.') for d in KINDS)}; got {dtype}")
    table = Table(title=f"{dtype}, {threads} thread(s), {torch.backends.cpu.get_cpu_capability()}; medians")
    for column in ("heads", "requests", "loops, GFLOP/s", "vLLM's kernel, GFLOP/s", "ratio"):
        table.add_column(column, justify="left" if column in ("heads", "requests") else "right")
    figures, missed = [], []
    for (heads, sizes), (requests, lengths) in track(
        [(h, r) for h in HEADS.items() for r in REQUESTS.items()], "attending"
    ):
        case = make(*sizes, *lengths, kind)
        seconds = measure(case, rounds)
        rates = [case.operations / s / 1e9 for s in seconds]
        ratio = seconds[1] / seconds[0]
        table.add_row(heads, requests, *(f"{rate:.1f}" for rate in rates), f"{ratio:.2f}")
        figures.append({"heads": heads, "requests": requests, "gflops": rates, "ratio": ratio})
        if ratio < GOAL:
            missed.append(f"{heads}, {requests}: {ratio:.2f}, goal {GOAL}")
    Console(width=120).print(table)
    for line in missed:
        print("missed:", line)
    if json_file is not None:
        json_file.write_text(json.dumps({"dtype": dtype, "threads": threads, "cases": figures}, indent=2))
    if check and missed:
        raise typer.Exit(1)


def make(heads: int, kv_heads: int, dim: int, count: int, queries: int, seen: int, dtype: torch.dtype) -> Case:
    """Return `count` requests whose `queries` tokens are the last of `seen`, with pages in random order."""
    torch.manual_seed(0)
    q = torch.randn(count * queries, heads, dim).to(dtype)
    k, v = (torch.randn(count * seen, kv_heads, dim).to(dtype) for _ in "kv")
    blocks = Blocks.of(torch.arange(count + 1) * seen, PAGE)
    order = torch.randperm(blocks.count)
    slots, rows = order[blocks.slots // PAGE] * PAGE + blocks.slots % PAGE, order[blocks.table].to(torch.int32)
    cache = torch.zeros(blocks.count, kv_heads, 2 * PAGE, dim, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    isa = compat.cpu_isa(dtype, dim)
    operators.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa)
    spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=dim**-0.5)
    pages = pages_of(cache.view(blocks.count, kv_heads, PAGE, 2 * dim), isa, spec)
    if pages is None:
        raise typer.BadParameter(f"vLLM's cache for {isa!r} has another form here: an engine attends by vLLM's kernel")
    bounds = (torch.arange(count + 1) * queries).to(torch.int32)
    lengths = torch.full((count,), seen, dtype=torch.int32)
    plan = operators.cpu_attn_get_scheduler_metadata(
        count, heads, kv_heads, dim, lengths, dtype, bounds, True, -1, isa, True
    )
    asked = paged.Requests(bounds, lengths, rows)

    def theirs(out: torch.Tensor) -> None:
        operators.cpu_attention_with_kv_cache(
            q, keys, values, out, bounds, lengths, spec.scale, True, None, -1, rows, 0.0, plan, None
        )

    pairs = count * (queries * (seen - queries) + queries * (queries + 1) // 2)
    return Case(4 * pairs * heads * dim, lambda out: paged.attend(q, pages, asked, out), theirs, q.clone())


def measure(case: Case, rounds: int) -> list[float]:
    """Return the seconds of the native and of vLLM's kernel: medians of batches of calls of about 20 ms."""
    seconds: list[list[float]] = [[], []]
    calls = [1, 1]
    for index in range(rounds + 1):
        for side, attend in enumerate((case.ours, case.theirs)):
            before = time.perf_counter()
            for _ in range(calls[side]):
                attend(case.out)
            taken = (time.perf_counter() - before) / calls[side]
            if index:
                seconds[side].append(taken)
            else:
                calls[side] = max(1, int(0.02 / taken))
    return [statistics.median(side) for side in seconds]


if __name__ == "__main__":
    typer.run(main)
