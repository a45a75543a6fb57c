"""Causal attention, forward and backward, from many short sequences to one long one, against torch's own kernels.

    python benchmarks/attention_lengths.py [--device cuda] [--dtype bfloat16] [--json FILE] [--check]

There are two layouts. `padded`: sequences of equal length, a batch for torch's `scaled_dot_product_attention`.
`packed`: sequences of mixed lengths, which it needs padded to the longest. polyshard's kernels take both as packed
tokens. Contestants alternate in one process; a ratio is the contestant's median time over polyshard's. `--check` exits
with status 1 if polyshard is more than 5 % slower than the fastest contestant in any row.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import Report
from rich.progress import track
from timing import alternating, matmul_peak
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import polyshard as ps
from polyshard.attention.selection import select_kernel
from polyshard.core.attention import AttentionSpec

HEADS, KV_HEADS = 16, 8
LOADS = {"cuda": ((64, 128), (32, 512), (16, 2048), (4, 8192), (1, 32768)), "cpu": ((8, 16), (1, 128))}
HEAD_DIMS = {"cuda": (64, 128), "cpu": (64,)}
SLACK = 1.05
Tensors = tuple[torch.Tensor, ...]


def mixed(count: int, length: int) -> list[int]:
    """Return lengths between half and one and a half times `length`, with mean `length`."""
    if count == 1:
        return [length]
    return [length // 2 + length * index // (count - 1) for index in range(count)]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: Any) -> torch.Tensor:
    return ps.packed_attention(q, k, v, bounds)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor | None, count: int, backend: Any = None
) -> torch.Tensor:
    """Return torch's attention over a batch `[count, longest]`; `rows` maps packed tokens into the batch and back."""
    heads = []
    for t in (q, k, v):
        if rows is not None:
            longest = int(rows.shape[0]) // count
            t = F.pad(t, (0, 0, 0, 0, 0, 1))[rows]
            heads.append(t.view(count, longest, *t.shape[1:]).transpose(1, 2))
        else:
            heads.append(t.view(count, -1, *t.shape[1:]).transpose(1, 2))
    if backend is None:
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if rows is None else out[rows < len(q)]


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int) -> torch.Tensor:
    """Return torch's function for packed sequences, which has no grouped KV heads before torch 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=True)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0))


def places(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Return, for each slot of a padded batch, the index of its packed token, or the number of tokens for padding."""
    total, longest = sum(lengths), max(lengths)
    table = torch.full((len(lengths), longest), total, dtype=torch.int64)
    start = 0
    for row, length in enumerate(lengths):
        table[row, :length] = torch.arange(start, start + length)
        start += length
    return table.flatten().to(device)


def contestants(lengths: list[int], device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the implementations of attention within sequences of these lengths."""
    host = torch.tensor([0, *lengths]).cumsum(0)
    cu = host.to(device=device, dtype=torch.int32)
    even = len(set(lengths)) == 1
    rows = None if even else places(lengths, device)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "polyshard": partial(ours, bounds=ps.pack(cu, int(host[-1]))),
        "sdpa": partial(sdpa, rows=rows, count=len(lengths)),
    }
    if device.type == "cuda":
        ways["sdpa flash"] = partial(sdpa, rows=rows, count=len(lengths), backend=SDPBackend.FLASH_ATTENTION)
        ways["sdpa cudnn"] = partial(sdpa, rows=rows, count=len(lengths), backend=SDPBackend.CUDNN_ATTENTION)
        ways["torch varlen"] = partial(varlen, cu=cu, longest=max(lengths))
    return ways


def step(way: Callable[..., torch.Tensor], tensors: Tensors, grad: torch.Tensor, backward: bool) -> None:
    out = way(*tensors)
    if backward:
        torch.autograd.grad(out, tensors, grad)


def agreeing(
    ways: dict[str, Callable[..., torch.Tensor]], tensors: Tensors, close: float
) -> tuple[dict[str, Callable[..., torch.Tensor]], dict[str, str]]:
    """Return the implementations that run and give polyshard's output, and why the others are omitted."""
    kept, dropped = {}, {}
    with torch.no_grad():
        want = ways["polyshard"](*tensors).float()
        for name, way in ways.items():
            try:
                difference = float((way(*tensors).float() - want).abs().max())
            except (RuntimeError, ImportError, TypeError) as error:
                dropped[name] = str(error).strip().splitlines()[0][:120]
                continue
            if difference > close:
                raise SystemExit(f"{name} differs from polyshard by {difference:.2e}")
            kept[name] = way
    return kept, dropped


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
    kind = getattr(torch, dtype)
    report = Report(
        ("layout", "load", "head_dim", "pass", "kernel", "ms", "TFLOP/s", "of peak", "ratios", "left out"), lines
    )
    peak = matmul_peak(kind, where)
    cases = [
        (layout, count, length, dim, backward)
        for count, length in LOADS[where.type]
        for dim in HEAD_DIMS[where.type]
        for layout in ("padded", "packed")
        for backward in (False, True)
        if not (layout == "packed" and count == 1)
    ]
    for layout, count, length, dim, backward in track(cases, "measuring", transient=True):
        lengths = [length] * count if layout == "padded" else mixed(count, length)
        torch.manual_seed(0)
        tokens = sum(lengths)
        tensors = tuple(
            torch.randn(tokens, heads, dim, device=where).to(kind).requires_grad_(backward)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        grad = torch.randn(tokens, HEADS, dim, device=where).to(kind)
        ways, dropped = agreeing(contestants(lengths, where), tensors, 0.05)
        actions = {name: partial(step, way, tensors, grad, backward) for name, way in ways.items()}
        times = alternating(actions, where, rounds, repeats=10 if where.type == "cuda" else 1)
        flop = sum((7 if backward else 2) * n * n * dim * HEADS for n in lengths)  # causal: half of all scores
        speed = flop / times["polyshard"]
        spec = AttentionSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=dim, scale=dim**-0.5)
        ratios = {name: spent / times["polyshard"] for name, spent in times.items() if name != "polyshard"}
        report.add(
            layout=layout,
            load=f"{count} x {length}",
            head_dim=dim,
            **{"pass": "forward + backward" if backward else "forward"},
            kernel=select_kernel(spec, where, kind, True).name,
            ms=times["polyshard"] * 1e3,
            **{"TFLOP/s": speed / 1e12, "of peak": speed / peak},
            ratios=", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
            **{"left out": ", ".join(dropped) or None},
        )
        fastest = min(ratios, key=lambda name: ratios[name])
        if ratios[fastest] < 1 / SLACK:
            report.missed.append(
                f"{layout} {count} x {length}, {dim}: {fastest} takes {ratios[fastest]:.2f} of our time"
            )
    report.show()
    report.save(json_file, where)
    if check and report.missed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
