"""SmolLM2 in mixed precision: a hundred AdamW steps on every library, beside transformers in float64 and float32.

    python benchmarks/precision.py [--steps 100] [--only torch] [--json FILE] [--check]

Every run starts from the same bfloat16 weights and reads the same rows of this repository's documentation. The
distance of a run is the mean difference of its losses from those of transformers in float64. The row of transformers
with bfloat16 parameters and no masters shows the distance of a lossy run, the row under autocast that of bfloat16
matrix products alone.
`--check` exits with status 1 if the distance of an engine is more than a quarter of the lossy run's.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import decoder
import torch
import typer
from report import Report
from smollm2 import smollm2_directory
from torch.nn import functional as F

import polyshard as ps
from polyshard.testing import run_ranks

ROOT = Path(__file__).resolve().parents[1]
RANKS, ROWS, LENGTH = 2, 2, 64  # ranks, rows of a batch, tokens of a row
LR = 3e-5
MARGIN = 4.0
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        library: name of the adapter for engine and layers.
        precision: of the run.
        options: of the engine.
    """

    library: str
    precision: ps.Precision
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Options and dtypes."""
        kind = "bfloat16 parameters, masters" if self.precision.has_masters else "float32 parameters, bfloat16 compute"
        return ", ".join((kind, *(f"{name} {value}" for name, value in self.options.items())))


CASTS, HALF = ps.Precision(compute=BF16), ps.Precision(parameters=BF16)
CASES = [
    Case("torch", CASTS, {"data_parallel": "ddp"}),
    Case("torch", HALF, {"data_parallel": "ddp"}),
    Case("torch", CASTS, {"data_parallel": "fsdp"}),
    Case("megatron", HALF, {"zero_stage": 1}),
    Case("deepspeed", HALF, {"zero_stage": 1}),
    Case("deepspeed", CASTS, {"zero_stage": 2}),
    Case("fairscale", CASTS, {"zero_stage": 1}),
]


def rows(steps: int) -> torch.Tensor:
    """Rows of the documentation's text as token IDs, int64 `[steps, ROWS, LENGTH + 1]`."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(smollm2_directory())
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))
    wanted = steps * ROWS * (LENGTH + 1)
    ids = torch.tensor(tokenizer(text[: 8 * wanted])["input_ids"][:wanted])
    return ids.view(steps, ROWS, LENGTH + 1)


def of_transformers(directory: Path, batches: torch.Tensor, dtype: torch.dtype, autocast: bool = False) -> torch.Tensor:
    """The loss of each step in one process, float64 `[steps]`; `autocast` computes products in bfloat16."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=BF16).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, betas=(0.9, 0.95))
    losses = []
    for batch in batches:
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).to(dtype), batch[:, 1:].flatten())
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses, dtype=torch.float64)


def of_engine(directory: Path, batches: torch.Tensor, case: Case) -> torch.Tensor:
    """The same of an engine, on each rank."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    context = ps.initialize(case.library, timeout=600)
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    with torch.no_grad():  # the file may hold more bits
        for parameter in model.parameters():
            parameter.copy_(parameter.to(BF16))
    engine = ps.load_adapter(case.library).engine(
        model.to(case.precision.parameters),
        ps.AdamW(lr=LR, weight_decay=0.0, betas=(0.9, 0.95)),
        context,
        max_grad_norm=1.0,
        precision=case.precision,
        **case.options,
    )
    rank = context.axis("data").rank
    losses = []
    for batch in batches:
        mine = batch[rank : rank + 1]
        inputs = {"input_ids": mine[:, :-1].contiguous(), "labels": mine[:, 1:].contiguous()}
        losses.append(engine.train_batch([inputs]).loss.item())
        engine.step()
    engine.close()
    ps.shutdown(context)
    return torch.tensor(losses, dtype=torch.float64)


def main(
    steps: int = 100,
    only: Annotated[str | None, typer.Option(help="One library.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with status 1 if an engine leaves the band.")] = False,
) -> None:
    """Compare the losses of every library's mixed precision with transformers in float64."""
    directory, batches = smollm2_directory(), rows(steps)
    report = Report(("run", "precision", "first loss", "last loss", "mean distance", "largest distance"))
    exact = of_transformers(directory, batches, torch.float64)

    def add(run: str, precision: str, found: torch.Tensor) -> float:
        apart = (found - exact).abs()
        first, last = float(found[0]), float(found[-5:].mean())
        report.add(
            **{"run": run, "precision": precision, "first loss": first, "last loss": last},
            **{"mean distance": float(apart.mean()), "largest distance": float(apart.max())},
        )
        return float(apart.mean())

    add("transformers", "float64", exact)
    add("transformers", "float32", of_transformers(directory, batches, torch.float32))
    add("transformers", "float32, autocast to bfloat16", of_transformers(directory, batches, torch.float32, True))
    lossy = add("transformers", "bfloat16, no masters", of_transformers(directory, batches, BF16))
    for case in CASES:
        if only in (None, case.library):
            found = run_ranks(of_engine, RANKS, directory, batches, case, timeout=1800)[0]
            distance = add(case.library, case.label, found)
            if distance > lossy / MARGIN:
                report.missed.append(f"{case.library}, {case.label}: {distance:.2g} of {lossy / MARGIN:.2g}")
    report.show()
    report.save(json_file, torch.device("cpu"))
    if check and report.missed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
