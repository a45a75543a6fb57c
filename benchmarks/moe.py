"""A mixture-of-experts layer: `ps.mixture_of_experts` against transformers' block and the libraries' own layers.

    python benchmarks/moe.py [--device cuda] [--json FILE] [--check]

A step is forward and backward of one layer of the shape of Qwen3-MoE, with 8 experts per token and 1024 tokens.

- `transformers` is `Qwen3MoeSparseMoeBlock` as it is built by default, with grouped matmuls. With 8 experts every token
  takes all of them; the growth to 256 experts shows the cost of small groups.
- `by hand` is Megatron-Core's `MoELayer` and the layer of DeepSpeed's AutoEP, each with its own router, beside
  polyshard on that library's experts; one rank with one thread. Megatron's dispatcher is `allgather` in both.
- `expert 1` is polyshard's layer on two ranks of one thread with all experts on each, beside half of the experts on
  each, which exchange their rows. An engine would average the gradients of the former, which is not measured.

`--check` exits with status 1 if the layer takes more than 0.8 of the time of transformers' block at 64 experts or more
than 1.02 of a library's layer, or if outputs differ.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from report import Report
from rich.progress import track
from timing import ratio_of_rounds, times_of_rounds

sys.path.insert(0, str(Path(__file__).resolve().parent))

from moe_contestants import BY_HAND, HIDDEN, TOKENS, of_polyshard, of_transformers, weights

import polyshard as ps
from polyshard.testing import run_ranks

EXPERTS, COMPARED = (8, 64, 256), 64
DTYPES = (torch.float32, torch.bfloat16)
GOALS = {"transformers": 0.8, "by hand": 1.02}  # of their time at 64 experts


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; default cuda if there is one.")] = "",
    rounds: int = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if a goal is missed.")] = False,
) -> None:
    """Run the comparisons."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = Report(("against", "experts", "dtype", "layer", "ms", "ratio", "growth"), lines)
    for dtype in DTYPES:
        first: dict[str, float] = {}
        for experts in track(EXPERTS, f"measuring {dtype}", transient=True):
            add(report, "transformers", experts, dtype, against_transformers(experts, dtype, where, rounds), first)
        for library in vars(BY_HAND):
            found = run_ranks(by_hand, 1, library, dtype, rounds, timeout=900)[0]
            add(report, "by hand", COMPARED, dtype, found, {})
        if where.type == "cpu" or torch.cuda.device_count() > 1:
            found = run_ranks(expert_parallel, 2, dtype, rounds, timeout=900)[0]
            add(report, "expert 1", COMPARED, dtype, found, {})
    report.show()
    report.save(json_file, where)
    if check and report.missed:
        sys.exit(1)


def against_transformers(experts: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of a step of each layer, the one compared with first, and how far their outputs are apart."""
    values = weights(experts, dtype, device)
    context = ps.initialize("torch", device=device)
    return compared({"transformers": of_transformers(values), "polyshard": of_polyshard(context, values)}, rounds)


def by_hand(library: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The same of a library's own layer and polyshard's on its experts; on one rank."""
    options = {"token_dispatcher": "allgather"} if library == "megatron" else {}
    context = ps.initialize(library, timeout=600, **options)
    values = weights(COMPARED, dtype, context.device)
    hand, ours = getattr(BY_HAND, library)(values), of_polyshard(context, values)
    found = compared({f"{library}, by hand": hand, f"polyshard on {library}": ours}, rounds)
    ps.shutdown(context)
    return found


def expert_parallel(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The same of polyshard's layer with all experts on each rank and with half of them; on two ranks."""
    context = ps.initialize("torch", expert=2, timeout=600)
    alone = ps.GroupContext(layout=ps.ParallelLayout(), device=context.device, linear=context.linear)
    values = weights(COMPARED, dtype, context.device)
    layers = {"polyshard, expert 1": of_polyshard(alone, values), "polyshard, expert 2": of_polyshard(context, values)}
    found = compared(layers, rounds, together=True)
    ps.shutdown(context)
    return found


def compared(layers: dict[str, Any], rounds: int, together: bool = False) -> dict[str, Any]:
    """Seconds of a step in each round by name, and the largest difference of outputs over the largest output."""
    values = next(next(iter(layers.values())).module.parameters())
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(values.device, values.dtype)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)

    def step(layer: Any) -> None:
        if together:
            dist.barrier()
        layer.step(x, weight)

    base, other = (layer.output(x).float() for layer in layers.values())
    apart = float((other - base).abs().max() / base.abs().max())
    times = times_of_rounds({name: partial(step, layer) for name, layer in layers.items()}, x.device, rounds)
    return {"times": times, "apart": apart}


def add(
    report: Report, against: str, experts: int, dtype: torch.dtype, found: dict[str, Any], first: dict[str, float]
) -> None:
    """Add a row for each layer, and the goals that were missed."""
    times, kind = found["times"], str(dtype).removeprefix("torch.")
    base = next(iter(times))
    for name in times:
        seconds, ratio = statistics.median(times[name]), ratio_of_rounds(times, name, base)
        report.add(
            **{"against": against, "experts": experts, "dtype": kind, "layer": name, "ms": seconds * 1e3},
            ratio=ratio,
            growth=seconds / first.setdefault(name, seconds),
        )
    goal = GOALS.get(against)
    if goal is not None and experts == COMPARED and ratio > goal:
        report.missed.append(f"{name}, {kind}: {ratio:.2f} of the time of {against}, expected {goal}")
    if found["apart"] > (1e-5 if dtype == torch.float32 else 5e-2):
        report.missed.append(f"{name}, {kind}: outputs differ by {found['apart']:.1e}")


if __name__ == "__main__":
    typer.run(main)
