"""The mixture-of-experts layer: `ps.mixture_of_experts` against transformers' block.

    python benchmarks/moe.py [--device cuda] [--json FILE] [--check]

A step is forward and backward of one layer of the shape of Qwen3-MoE, with 8 experts per token. `transformers` is
`Qwen3MoeSparseMoeBlock` as it is built by default, with grouped matmuls. With 8 experts every token takes all of them;
the growth to 256 experts shows the cost of small groups. `--check` exits with status 1 if the layer takes more than
`GOAL` of the time of transformers' block at 64 experts, or if the outputs differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from report import Report
from rich.progress import track
from timing import alternating
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import polyshard as ps

HIDDEN, SIZE, PER_TOKEN, TOKENS = 576, 192, 8, 1024
EXPERTS = (8, 64, 256)
DTYPES = (torch.float32, torch.bfloat16)
GOAL = 1.1  # of the time of transformers' block at 64 experts; nine tenths of both are the same grouped matmul


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; default cuda if there is one.")] = "",
    rounds: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if a goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = Report(("experts", "dtype", "layer", "ms", "ratio", "growth"), lines)
    for dtype in DTYPES:
        first: dict[str, float] = {}
        for experts in track(EXPERTS, f"measuring {dtype}", transient=True):
            _measure(report, experts, dtype, where, rounds, first)
    report.show()
    report.save(json_file, where)
    if check and report.missed:
        sys.exit(1)


def _measure(
    report: Report, experts: int, dtype: torch.dtype, device: torch.device, rounds: int, first: dict[str, float]
) -> None:
    layers = _layers(experts, dtype, device)
    x = torch.randn(1, TOKENS, HIDDEN, device=device).to(dtype)
    weight = torch.randn_like(x)
    outputs = {name: _output(layer, x) for name, layer in layers.items()}
    spent = alternating({name: _step(layer, x, weight) for name, layer in layers.items()}, device, rounds)
    for name, seconds in spent.items():
        ratio = seconds / spent["transformers"]
        report.add(
            experts=experts,
            dtype=str(dtype).removeprefix("torch."),
            layer=name,
            ms=seconds * 1e3,
            ratio=ratio,
            growth=seconds / first.setdefault(name, seconds),
        )
        if name == "polyshard" and experts == 64 and ratio > GOAL:
            report.missed.append(f"{ratio:.2f} of transformers' time at 64 experts in {dtype}, expected {GOAL}")
    difference = (outputs["polyshard"] - outputs["transformers"]).abs().max() / outputs["transformers"].abs().max()
    if difference > (1e-5 if dtype == torch.float32 else 5e-2):
        report.missed.append(f"outputs of {experts} experts in {dtype} differ by {float(difference):.1e}")


def _layers(experts: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the contestants, with equal weights."""
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": SIZE, "num_experts": experts}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts_per_tok=PER_TOKEN, norm_topk_prob=True)
    config._experts_implementation = "grouped_mm"  # the default of models that are loaded
    block = Qwen3MoeSparseMoeBlock(config).to(device, dtype)
    context = ps.initialize("torch", device=device)
    router = ps.Router(normalize=True)
    ours = ps.mixture_of_experts(HIDDEN, SIZE, experts, PER_TOKEN, context, router=router).to(dtype)
    weights = [ours.gate.weight, ours.experts.gate_up, ours.experts.down]
    with torch.no_grad():
        for weight in weights:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        for target, source in zip((block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj), weights):
            target.copy_(source)
    return {"transformers": block, "polyshard": ours}


def _output(layer: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = layer(x)
    return output[0] if isinstance(output, tuple) else output


def _step(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        inputs = x.detach().requires_grad_()
        output = layer(inputs)
        (output[0] if isinstance(output, tuple) else output).backward(weight)

    return step


if __name__ == "__main__":
    typer.run(main)
