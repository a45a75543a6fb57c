"""A training step of a decoder: polyshard against transformers, eager and compiled, alternating in one process.

    python benchmarks/training.py [MODEL] [--device cuda] [--dtype bfloat16] [--json FILE] [--check]

MODEL is `qwen3-0.6b` (the published shape with random weights), `smollm2` (SmolLM2-135M's shape) or `tiny`. The step is
forward, loss, backward and torch's fused AdamW on parameters of the given dtype. transformers uses the fastest of the
installed attention implementations. Every contestant starts from the same weights, and the first losses must agree.
Utilization is the model's FLOPs (6 per weight and token, and attention's) over a matmul's measured rate. `--check`
exits with status 1 if polyshard takes more than 0.90 of transformers' time, or more memory.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import typer
from decoder import build_model
from report import Report
from rich.progress import Progress
from timing import alternating, matmul_peak, seconds, synchronize
from torch import nn

import polyshard as ps

GOAL = 0.90
LOADS = {"cuda": ((8, 1024), (1, 8192)), "cpu": ((4, 128), (1, 1024))}
ATTENTION = {"cuda": ("flash_attention_2", "sdpa"), "cpu": ("sdpa", "eager")}  # the fastest one is used
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


@dataclass
class Contestant:
    """One implementation of training.

    Attributes:
        loss: maps `(input IDs [rows, length], labels)` to the mean loss; a label is the next token.
        step: updates the weights and clears the gradients.
        detail: the attention implementation.
    """

    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    step: Callable[[], Any]
    detail: str


def flops_per_token(shape: dict[str, Any], length: int) -> float:
    """Return the FLOPs of forward and backward: 6 per weight of a matmul, including the head, and attention's."""
    h, f, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    q, kv = (shape[name] * shape["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    weights = layers * (h * (q + 2 * kv) + q * h + 3 * h * f) + shape["vocab_size"] * h
    return 6.0 * weights + 6.0 * layers * q * length


def transformers_model(directory: Path, attention: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    return model.to(device).train()


def save_random(shape: dict[str, Any], directory: Path, dtype: torch.dtype) -> None:
    """Return a Hugging Face directory with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(directory)


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def of_transformers(
    directory: Path, dtype: torch.dtype, device: torch.device, compiled: bool, batch: tuple[torch.Tensor, torch.Tensor]
) -> Contestant:
    """Return the fastest attention implementation of transformers on this machine, by timing each."""
    best, times = "", {}
    for attention in ATTENTION[device.type]:
        try:
            model = transformers_model(directory, attention, dtype, device)
            run = partial(_forward_backward, partial(_transformers_loss, model), batch)
            run()
            times[attention] = min(seconds(run, device) for _ in range(2))
        except (ImportError, ValueError, RuntimeError, torch.OutOfMemoryError):
            continue
        finally:
            model = None
            _free(device)
    best = min(times, key=lambda name: times[name])
    model = transformers_model(directory, best, dtype, device)
    optimizer = fused_adamw(model)
    called: Any = torch.compile(model) if compiled else model
    return Contestant(partial(_transformers_loss, called), partial(_update, optimizer), best)


def of_polyshard(directory: Path, dtype: torch.dtype, device: torch.device, compiled: bool) -> Contestant:
    from polyshard.attention.selection import select_kernel

    context = ps.initialize("torch", device=device)
    model = build_model(ps.read_config(directory), context)
    model.to(dtype)
    ps.load_checkpoint(model, directory, context, verify=False)
    blocks = list(model.model.layers)
    if compiled:
        for block in blocks:
            block.compile(fullgraph=True)
    first: Any = blocks[0]
    kernel = select_kernel(first.self_attn.spec, device, dtype, True).name
    optimizer = fused_adamw(model)
    return Contestant(lambda ids, labels: model(ids, labels=labels), partial(_update, optimizer), kernel)


def _transformers_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _forward_backward(loss: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    value = loss(*batch)
    value.backward()
    return value.detach()


def _update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def train_step(contestant: Contestant, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    loss = _forward_backward(contestant.loss, batch)
    contestant.step()
    return loss


def peak_memory(action: Callable[[], Any], held: int, device: torch.device) -> float | None:
    """Return the GiB of one step, including weights and optimizer state; None on CPU, which does not count them."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 2**30


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def main(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-0.6b",
    device: Annotated[str, typer.Option(help="cuda or cpu; default cuda if there is one.")] = "",
    dtype: str = "bfloat16",
    loads: Annotated[str, typer.Option(help="Rows x length, comma-separated, such as 8x1024,1x8192.")] = "",
    compiled: Annotated[bool, typer.Option(help="Also with torch.compile on both sides.")] = True,
    rounds: int = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if a goal is missed.")] = False,
) -> None:
    """Run the comparison."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind, shape = getattr(torch, dtype), SHAPES[model]
    chosen = [tuple(map(int, load.split("x"))) for load in loads.split(",")] if loads else LOADS[where.type]
    # The lengths of packed sequences are data; without this, Dynamo breaks the graph at every attention call.
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    columns = ("model", "load", "mode", "contestant", "attention", "ms", "tokens/s", "utilisation", "peak GiB", "ratio")
    report = Report(columns, lines)
    peak = matmul_peak(kind, where)
    with tempfile.TemporaryDirectory(prefix="polyshard-bench-") as work, Progress(transient=True) as bar:
        save_random(shape, Path(work), kind)
        modes = (False, True) if compiled else (False,)
        task = bar.add_task("measuring", total=len(modes) * len(chosen))
        for with_compiler in modes:
            _measure_mode(report, model, Path(work), kind, where, with_compiler, chosen, rounds, peak, bar, task)
    report.show()
    report.save(json_file, where)
    if check and report.missed:
        sys.exit(1)


def _measure_mode(
    report: Report,
    model: str,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool,
    loads: Any,
    rounds: int,
    peak: float,
    bar: Progress,
    task: Any,
) -> None:
    shape, mode = SHAPES[model], "compiled" if compiled else "eager"
    batches = {load: _batch(shape["vocab_size"], *load, device) for load in loads}
    contestants: dict[str, Contestant] = {}
    own: dict[str, int] = {}  # bytes of weights and optimizer state
    for name in ("polyshard", "transformers"):
        torch._dynamo.reset()
        before = allocated(device)
        if name == "polyshard":
            contestants[name] = of_polyshard(directory, dtype, device, compiled)
        else:
            contestants[name] = of_transformers(directory, dtype, device, compiled, next(iter(batches.values())))
        first = train_step(contestants[name], next(iter(batches.values())))
        own[name] = allocated(device) - before
        if name == "polyshard":
            reference = float(first)
        elif abs(float(first) - reference) > 0.02 * reference:
            raise SystemExit(f"the first losses differ: {reference:.4f} and {float(first):.4f}")
    for load, batch in batches.items():
        actions = {name: partial(train_step, one, batch) for name, one in contestants.items()}
        times = alternating(actions, device, rounds)
        base = times["transformers"]
        memory = {}
        for name, action in actions.items():
            others = sum(size for other, size in own.items() if other != name)
            memory[name] = peak_memory(action, others, device)
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
                **{"tokens/s": tokens / times[name], "utilisation": rate / peak, "peak GiB": memory[name]},
                ratio=times[name] / base,
            )
        ratio, ours, theirs = times["polyshard"] / base, memory["polyshard"], memory["transformers"]
        if ratio > GOAL:
            report.missed.append(f"{mode}, {load[0]} x {load[1]}: {ratio:.2f} of transformers' time, not {GOAL}")
        if ours is not None and theirs is not None and ours > theirs:
            report.missed.append(f"{mode}, {load[0]} x {load[1]}: {ours:.2f} GiB, transformers {theirs:.2f}")
        bar.advance(task)
    contestants.clear()
    _free(device)


def _batch(vocabulary: int, rows: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


if __name__ == "__main__":
    typer.run(main)
