"""A training step of a decoder: polyshard against transformers, eager and compiled, alternating in one process.

    python benchmarks/training.py [MODEL] [--device cuda] [--dtype bfloat16] [--json FILE] [--check]

MODEL is `qwen3-0.6b` (the published shape with random weights), `qwen3-half` (hidden size 896, six layers), `smollm2`
(SmolLM2-135M's shape) or `tiny`. The step is forward, loss, backward and torch's fused AdamW on parameters of the given
dtype. transformers uses the fastest of the installed attention implementations; Megatron-Core's GPTModel takes part
where it is installed. Eager and compiled steps run in separate processes. Every contestant starts from the same
weights, and the first losses must agree. Utilization is the model's FLOPs (6 per weight and token, and attention's)
over a matmul's measured rate. The ratio is the median over the rounds of polyshard's time divided by the row's.
`--check` exits with status 1 if polyshard takes more than 0.90 of transformers' time, more than 0.75 of GPTModel's, or
more memory.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import typer
from report import Report
from rich.progress import Progress
from timing import matmul_peak, peak_bytes, ratio_of_rounds, times_of_rounds
from training_contestants import Contestant, of_megatron, of_polyshard, of_transformers, save_random

COLUMNS = ("model", "load", "mode", "contestant", "attention", "ms", "tokens/s", "utilisation", "peak GiB", "ratio")
GOALS = {"transformers": 0.90, "megatron": 0.75}  # of their time
LOADS = {"cuda": ((8, 1024), (1, 8192)), "cpu": ((4, 128), (1, 1024))}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-half": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 6,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def flops_per_token(shape: dict[str, Any], length: int) -> float:
    """Return the FLOPs of forward and backward: 6 per weight of a matmul, including the head, and attention's."""
    h, f, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    weights = layers * (h * (q + 2 * kv) + q * h + 3 * h * f) + shape["vocab_size"] * h
    return 6.0 * weights + 6.0 * layers * q * length


def main(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-0.6b",
    device: Annotated[str, typer.Option(help="cuda or cpu; default cuda if there is one.")] = "",
    dtype: str = "bfloat16",
    loads: Annotated[str, typer.Option(help="Rows x length, comma-separated, such as 8x1024,1x8192.")] = "",
    compiled: Annotated[bool, typer.Option(help="Also with torch.compile on both sides.")] = True,
    megatron: Annotated[bool, typer.Option(help="Also Megatron-Core's GPTModel, which is not compiled.")] = True,
    rounds: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if a goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind, shape = getattr(torch, dtype), SHAPES[model]
    chosen = [tuple(map(int, load.split("x"))) for load in loads.split(",")] if loads else LOADS[where.type]
    report = Report(COLUMNS, lines)
    peak = matmul_peak(kind, where)
    with tempfile.TemporaryDirectory(prefix="polyshard-bench-") as work, Progress(transient=True) as bar:
        save_random(shape, Path(work), kind)
        modes = (False, True) if compiled else (False,)
        task = bar.add_task("measuring", total=len(modes))
        for with_compiler in modes:
            also = megatron and not with_compiler and find_spec("megatron") is not None
            others = ("transformers", "megatron") if also else ("transformers",)
            # A process for each mode, so that models which ran before do not affect the memory of those that follow.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found = process.submit(
                    _measure_mode, model, Path(work), kind, where, with_compiler, others, chosen, rounds, peak, lines
                ).result()
            report.rows += found.rows
            report.missed += found.missed
            bar.advance(task)
    report.show()
    report.save(json_file, where)
    if check and report.missed:
        sys.exit(1)


def _measure_mode(
    model: str,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
    others: tuple[str, ...],
    loads: Any,
    rounds: int,
    peak: float,
    lines: Path | None,
) -> Report:
    """Measure eager or compiled steps of every contestant at every load."""
    report = Report(COLUMNS, lines)
    shape, mode = SHAPES[model], "compiled" if compiled else "eager"
    batches = {load: _batch(shape["vocab_size"], *load, device) for load in loads}
    some = next(iter(batches.values()))
    contestants: dict[str, Contestant] = {}
    reference = 0.0
    for name in ("polyshard", *others):
        torch._dynamo.reset()
        if name == "polyshard":
            contestants[name] = of_polyshard(directory, dtype, device, compiled)
        elif name == "transformers":
            contestants[name] = of_transformers(directory, dtype, device, compiled, some)
        else:
            contestants[name] = of_megatron(directory, dtype, device, max(length for _, length in loads))
        first = float(contestants[name].step(some))
        reference = reference or first
        if abs(first - reference) > 0.02 * reference:
            raise SystemExit(f"the first losses differ: {reference:.4f} of polyshard and {first:.4f} of {name}")
    for load, batch in batches.items():
        found = times_of_rounds({name: partial(one.step, batch) for name, one in contestants.items()}, device, rounds)
        times = {name: statistics.median(spent) for name, spent in found.items()}
        ratios = {name: ratio_of_rounds(found, "polyshard", name) for name in found}
        memory = {}
        for name, one in contestants.items():
            memory[name] = one.held_bytes() + peak_bytes(partial(one.step, batch), device)
        for name, one in contestants.items():
            tokens = load[0] * load[1]
            rate = flops_per_token(shape, load[1]) * tokens / times[name]
            report.add(
                model=model,
                load=f"{load[0]} x {load[1]}",
                mode=mode,
                contestant=name,
                attention=one.detail,
                ms=times[name] * 1e3,
                **{"tokens/s": tokens / times[name], "utilisation": rate / peak, "peak GiB": memory[name] / 2**30},
                ratio=ratios[name],
            )
        for name in others:
            ratio, where = ratios[name], f"{mode}, {load[0]} x {load[1]}"
            if ratio > GOALS[name]:
                report.missed.append(f"{where}: {ratio:.2f} of {name}'s time, not {GOALS[name]}")
            if memory["polyshard"] > memory[name]:
                report.missed.append(
                    f"{where}: {memory['polyshard'] / 2**30:.2f} GiB, {name} {memory[name] / 2**30:.2f}"
                )
    return report


def _batch(vocabulary: int, rows: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


if __name__ == "__main__":
    typer.run(main)
