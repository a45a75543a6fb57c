"""AdamW on every schedule of every library's pipeline, on the curve of transformers in one process.

    python benchmarks/pipeline_training.py [--steps 100] [--all-axes] [--json FILE] [--check]

Losses and gradient norms of each step are compared with transformers in float64. The largest differences may be four
times those of transformers in float32, which also rounds, or 1e-5. `--all-axes` trains a mixture of experts instead, on
16 ranks: tensor 2 with sequence parallel, context 2, pipeline 2, data 2, and the experts distributed over the data
axis. `--check` exits with status 1 if a curve is another.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # before benchmarks/moe.py

import decoder
import moe
import torch
import typer
from report import Report
from torch.nn import functional as F

import polyshard as ps
from polyshard.testing import run_ranks

COUNT, BATCH, LENGTH, VOCAB = 4, 2, 32, 128  # micro-batches of a step, rows, tokens
DISTINCT = 10  # steps until the data begins again, so that the loss falls
MARGIN, FLOOR = 4.0, 1e-5
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
ALL_AXES = {"tensor": 2, "sequence_parallel": True, "context": 2, "pipeline": 2, "expert": 2}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        library: name of the adapter for engine and layers.
        schedule: of the pipeline.
        ranks: number of processes.
        sizes: of the axes.
        options: of the engine.
    """

    library: str
    schedule: str
    ranks: int = 2
    sizes: dict[str, Any] = field(default_factory=lambda: {"pipeline": 2})
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    *(Case("torch", name) for name in ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble-v", "dualpipe-v")),
    *(Case("fairscale", name, options={"zero_stage": 1}) for name in ("1f1b", "zero-bubble-v")),
    *(Case("megatron", name, options={"zero_stage": 1}) for name in ("1f1b", "interleaved-1f1b")),
    Case("deepspeed", "1f1b", options={"zero_stage": 1}),
]


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of a step, with unequal numbers of labels."""
    generator = torch.Generator().manual_seed(step % DISTINCT)
    found = []
    for index in range(COUNT):
        tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, : 3 * index] = -100
        found.append({"input_ids": tokens[:, :-1].contiguous(), "labels": labels})
    return found


def save_model(directory: Path, experts: bool) -> None:
    import transformers

    torch.manual_seed(0)
    config = (
        transformers.Qwen3MoeConfig(**{**SHAPE, **EXPERTS}) if experts else transformers.LlamaConfig(**SHAPE)
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(directory)


def one_process(directory: Path, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Loss and gradient norm of each step of transformers: float64 `[steps, 2]`."""
    import transformers

    experts = {"experts_implementation": "eager"} if (directory / "experts").exists() else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **experts)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    figures = []
    for step in range(steps):
        batches = micro_batches(step)
        ids, labels = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels"))
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        figures.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(figures, dtype=torch.float64)


def pipelined(directory: Path, case: Case, steps: int) -> tuple[torch.Tensor, float]:
    """The same figures of a pipeline, and the milliseconds of a step; on each rank."""
    context = ps.initialize(case.library, timeout=300, **case.sizes)
    config = ps.read_config(directory)
    plan = ps.pipeline_plan(
        config.num_hidden_layers,
        context.layout.pipeline,
        schedule=case.schedule,  # type: ignore[arg-type]
    )
    build = moe.build_model if (directory / "experts").exists() else decoder.build_model
    model = ps.build_stages(build, config, context, plan)
    ps.load_checkpoint(model, directory, context)
    engine = ps.load_adapter(case.library).engine(model, ps.AdamW(**ADAMW), context, max_grad_norm=1.0, **case.options)
    data = context.axis("data")
    figures = []
    started = time.perf_counter()
    for step in range(steps):
        batches = [
            {name: ps.context_shard(value, context, dim=1).contiguous() for name, value in batch.items()}
            for batch in micro_batches(step)[data.rank :: data.size]
        ]
        loss = engine.train_batch(batches).loss.item()
        figures.append((loss, engine.step().grad_norm))
    spent = time.perf_counter() - started
    engine.close()
    ps.shutdown(context)
    return torch.tensor(figures, dtype=torch.float64), 1e3 * spent / steps


def main(
    steps: int = 100,
    all_axes: Annotated[bool, typer.Option(help="Train experts on 16 ranks, with every axis.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with status 1 if a curve is another.")] = False,
) -> None:
    """Compare the curves of all schedules and libraries with that of one process."""
    cases = [Case("torch", "1f1b", 16, ALL_AXES), Case("torch", "zero-bubble-v", 16, ALL_AXES)] if all_axes else CASES
    columns = ("library", "schedule", "ranks", "steps", "first loss", "last loss", "loss apart", "norm apart", "ms")
    report = Report(columns)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save_model(directory, all_axes)
        if all_axes:
            (directory / "experts").touch()
        exact, rounded = (one_process(directory, steps, dtype) for dtype in (torch.float64, torch.float32))
        allowed = (MARGIN * (rounded - exact).abs().amax(0)).clamp_min(FLOOR)
        for case in cases:
            of_ranks = run_ranks(pipelined, case.ranks, directory, case, steps, timeout=1800)
            apart = torch.stack([(found - exact).abs().amax(0) for found, _ in of_ranks]).amax(0)
            if bool((apart > allowed).any()):
                report.missed.append(
                    f"{case.library}, {case.schedule}: loss apart by {apart[0]:.2g} of {allowed[0]:.2g}, norm by "
                    f"{apart[1]:.2g} of {allowed[1]:.2g}"
                )
            found, milliseconds = of_ranks[0]
            report.add(
                **{"library": case.library, "schedule": case.schedule, "ranks": case.ranks, "steps": steps},
                **{"first loss": float(found[0, 0]), "last loss": float(found[-1, 0])},
                **{"loss apart": float(apart[0]), "norm apart": float(apart[1]), "ms": milliseconds},
            )
    report.show()
    print(f"allowed: loss {allowed[0]:.2g}, norm {allowed[1]:.2g}")
    report.save(json_file, torch.device("cpu"))
    if check and report.missed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
