"""The head and its loss: `ps.lm_loss` in chunks of tokens, against the loss of all logits.

    python benchmarks/lm_loss.py [--device cuda] [--dtype bfloat16] [--json FILE] [--check]

A step is forward and backward from hidden states to the gradients of hidden states and head, for vocabularies of 49,152
(SmolLM2) and 151,936 (Qwen3). `torch` is `F.cross_entropy` of all logits in float32. Memory is the peak of a step above
its inputs. `--check` exits with status 1 if `lm_loss` takes more than 1.25 of torch's time or more than its memory, or
if the losses differ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import Report
from rich.progress import track
from timing import alternating, peak_bytes
from torch.nn import functional as F

import polyshard as ps

SHAPES = ((49152, 576, 2048), (151936, 896, 1024))  # vocabulary, hidden size, tokens
CHUNKS = (512, 1024)
GOAL = 1.25  # of torch's time


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; default cuda if there is one.")] = "",
    dtype: str = "bfloat16",
    rounds: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if a goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    report = Report(("vocabulary", "hidden", "tokens", "dtype", "loss of", "ms", "MiB", "ratio", "of memory"), lines)
    for shape in track(SHAPES, "measuring", transient=True):
        _measure(report, shape, getattr(torch, dtype), where, rounds)
    report.show()
    report.save(json_file, where)
    if check and report.missed:
        sys.exit(1)


def _measure(
    report: Report, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, rounds: int
) -> None:
    vocabulary, size, tokens = shape
    context = ps.initialize("torch", device=device)
    head: Any = ps.lm_head(size, vocabulary, context).to(dtype)
    torch.nn.init.normal_(head.weight, std=size**-0.5)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)

    def step(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        value = loss()
        value.backward()
        hidden.grad = head.weight.grad = None
        return value.detach()

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "torch": lambda: F.cross_entropy(head(hidden).float(), labels),
        "all logits": lambda: ps.vocab_parallel_cross_entropy(head(hidden), labels, context),
    }
    for chunk in CHUNKS:
        ways[f"{chunk} tokens"] = partial(ps.lm_loss, hidden, head, labels, context, chunk_tokens=chunk)
    actions = {name: partial(step, loss) for name, loss in ways.items()}
    values = {name: float(action()) for name, action in actions.items()}
    times = alternating(actions, device, rounds)
    memory = {name: peak_bytes(action, device) for name, action in actions.items()}
    for name, seconds in times.items():
        ratio, share = seconds / times["torch"], memory[name] / memory["torch"]
        report.add(
            vocabulary=vocabulary,
            hidden=size,
            tokens=tokens,
            dtype=str(dtype).removeprefix("torch."),
            **{"loss of": name, "ms": seconds * 1e3, "MiB": memory[name] / 2**20, "ratio": ratio, "of memory": share},
        )
        if abs(values[name] - values["torch"]) > 1e-4 * values["torch"]:
            report.missed.append(f"{name}: a loss of {values[name]:.6f}, of torch {values['torch']:.6f}")
        if name.endswith("tokens") and (ratio > GOAL or share > 1):
            report.missed.append(f"{vocabulary}, {name}: {ratio:.2f} of torch's time, {share:.2f} of its memory")


if __name__ == "__main__":
    typer.run(main)
