"""Fine-tune a decoder on the Python documentation, on any parallelism library.

    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT
    torchrun --nproc-per-node 3 examples/train.py MODEL OUTPUT --tensor-parallel 3 --sequence-parallel
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --adapter deepspeed --zero 3
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --context-parallel 2
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --states runs/a    # a restart continues the run

MODEL is a Hugging Face directory of a Llama, Qwen2, Qwen3 or Mistral model (`python examples/smollm2.py` prints one),
and so is OUTPUT. Ranks that tensor and context parallel do not use form the data axis.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from decoder import build_model
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from text import token_rows

import polyshard as ps

NAME = "PolyshardDecoder"  # the architecture name under which servers find this model


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory to start from.")],
    output: Annotated[Path, typer.Argument(help="Directory of the trained model.")],
    adapter: Annotated[str, typer.Option(help="Parallelism library.")] = "torch",
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share each layer.")] = 1,
    context_parallel: Annotated[int, typer.Option(help="Ranks that share each sequence.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option(help="Shard activations along the sequence.")] = False,
    data_parallel: Annotated[str, typer.Option(help="ddp or fsdp (torch adapter).")] = "ddp",
    zero: Annotated[int | None, typer.Option(help="ZeRO stage (other adapters); default the library's.")] = None,
    steps: int = 32,
    batch: Annotated[int, typer.Option(help="Rows of each step, over all ranks.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    learning_rate: float = 1e-4,
    validation_rows: int = 16,
    figures: Annotated[Path | None, typer.Option(help="Write losses and speeds here, as JSON.")] = None,
    states: Annotated[Path | None, typer.Option(help="Save training states here, and go on from the latest.")] = None,
    every: Annotated[int, typer.Option(help="Steps between training states.")] = 8,
) -> None:
    """Train the model, report the validation loss before and after, and save a checkpoint."""
    context = ps.initialize(
        adapter, tensor=tensor_parallel, context=context_parallel, sequence_parallel=sequence_parallel
    )
    rank, share = context.get_data_parallel_rank(), context.get_data_parallel_world_size()
    first = all(context.axis(name).rank == 0 for name in ("data", "tensor", "context"))
    if batch % share or validation_rows % share:
        raise typer.BadParameter(f"batch {batch} and {validation_rows} validation rows must divide over {share} ranks")

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = token_rows(tokenizer, length, validation=False)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out = token_rows(tokenizer, length, validation=True)[:validation_rows]

    config = ps.read_config(model)
    decoder = build_model(config, context)
    ps.load_checkpoint(decoder, model, context)
    trainer = ps.load_adapter(adapter).engine(
        decoder,
        ps.AdamW(lr=learning_rate, weight_decay=0.01),
        context,
        **engine_options(adapter, data_parallel, zero),
    )

    begin, pending = 0, None
    latest = ps.latest_checkpoint(states) if states else None
    if latest is not None:
        begin = ps.load_training_state(trainer, latest, context).step
        if first:
            print(f"going on from {latest}", flush=True)

    before = validation_loss(trainer, held_out, context)
    losses, norms, speeds = [], [], []
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not first) as progress:
        task = progress.add_task("training", total=steps, completed=begin, line="")
        for step in range(begin, steps):
            started = time.perf_counter()
            trainer.set_learning_rate(learning_rate * schedule(step, steps))
            chosen = rows[[(step * batch + i) % len(rows) for i in range(batch)]][rank::share]
            inputs, labels = shards(chosen, context)
            loss = trainer.train_batch([{"input_ids": inputs, "labels": labels}]).loss
            norm = trainer.step().grad_norm
            losses.append(float(loss))
            norms.append(norm)
            speeds.append(batch * length / (time.perf_counter() - started))
            line = f"loss {losses[-1]:.3f}  {speeds[-1]:.0f} tokens/s  gradient norm {norm or math.nan:.2f}"
            progress.update(task, advance=1, line=line)
            if first and not progress.console.is_terminal and (step % 8 == 0 or step + 1 == steps):
                print(f"step {step + 1:3d}/{steps}  {line}", flush=True)
            if states and (step + 1) % every == 0:
                if isinstance(pending, ps.PendingSave):
                    pending.wait()
                place = states / f"step-{step + 1:08d}"
                pending = ps.save_training_state(
                    trainer, place, context, step=step + 1, config=config, companions=model, asynchronous=True
                )
    if isinstance(pending, ps.PendingSave):
        pending.wait()
    after = validation_loss(trainer, held_out, context)

    ps.save_checkpoint(
        trainer,
        output,
        context,
        config=config,
        architecture=NAME,
        factory="decoder:build_model",
        companions=model,
    )
    if first:
        print(f"validation loss {before:.3f} -> {after:.3f}; saved {output}")
        if figures is not None:
            numbers = {"validation_before": before, "validation_after": after, "losses": losses}
            figures.write_text(json.dumps({**numbers, "gradient_norms": norms, "tokens_per_second": speeds}, indent=2))
    trainer.close()
    ps.shutdown(context)


def engine_options(adapter: str, data_parallel: str, zero: int | None) -> dict[str, object]:
    """Return the engine options of each library."""
    if adapter == "torch":
        if zero is not None:
            raise typer.BadParameter("the torch adapter has no --zero: its form of stage 3 is --data-parallel fsdp")
        return {"max_grad_norm": 1.0, "data_parallel": data_parallel}
    return {"max_grad_norm": 1.0, **({} if zero is None else {"zero_stage": zero})}


def schedule(step: int, steps: int) -> float:
    """Return the learning rate factor: linear warm-up over a tenth of the steps, then cosine decay to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


@torch.no_grad()
def validation_loss(trainer: ps.TrainingEngine, rows: torch.Tensor, context: ps.ParallelContext) -> float:
    """Return the mean loss over held-out rows, which are divided evenly over data-parallel ranks.

    The mean of the rows' losses is the mean over tokens, since all rows have the same number of labels.
    """
    mine = rows[context.get_data_parallel_rank() :: context.get_data_parallel_world_size()]
    total = torch.zeros((), device=context.device)
    for part in mine.split(4):
        inputs, labels = shards(part, context)
        total += trainer(inputs, labels=labels) * len(part)
    return mean_over_data(total / len(mine), context)


def shards(rows: torch.Tensor, context: ps.ParallelContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's part of the input IDs and labels of rows `[rows, length + 1]`."""
    rows = rows.to(context.device)
    inputs, labels = (ps.context_shard(part, context, dim=1) for part in (rows[:, :-1], rows[:, 1:]))
    return inputs, labels


def mean_over_data(value: torch.Tensor, context: ps.ParallelContext) -> float:
    """Return the mean of a scalar over data-parallel ranks."""
    axis = context.axis("data")
    if axis.collectives is None:
        return float(value)
    return float(axis.collectives.all_reduce(value.detach())) / axis.size


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
