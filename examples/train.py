"""Fine-tune a decoder on the Python documentation, on any parallelism library.

    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT
    torchrun --nproc-per-node 3 examples/train.py MODEL OUTPUT --tensor-parallel 3 --sequence-parallel
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --adapter deepspeed --zero 3
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --context-parallel 2
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --precision bfloat16 --recompute full
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --data-parallel fsdp --precision mixed --compile
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --states runs/a    # a restart continues the run
    torchrun --nproc-per-node 2 examples/train.py MODEL OUTPUT --records runs/a   # JSON lines, and TensorBoard

MODEL is a Hugging Face directory of a Llama, Qwen2, Qwen3 or Mistral model (`python examples/smollm2.py` prints one),
and so is OUTPUT. Ranks that tensor and context parallel do not use form the data axis.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from decoder import build_model
from text import token_documents
from torch.optim.lr_scheduler import LambdaLR

import polyshard as ps

NAME = "PolyshardDecoder"  # the architecture name under which servers find this model
PRECISIONS = {
    "float32": ps.Precision(),
    "mixed": ps.Precision(compute=torch.bfloat16),  # float32 parameters, cast for each operation
    "bfloat16": ps.Precision(parameters=torch.bfloat16),  # with float32 masters in the optimizer
}


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory to start from.")],
    output: Annotated[str, typer.Argument(help="Directory or URL of the trained model.")],
    adapter: Annotated[str, typer.Option(help="Parallelism library.")] = "torch",
    tensor_parallel: Annotated[int, typer.Option(help="Ranks that share each layer.")] = 1,
    context_parallel: Annotated[int, typer.Option(help="Ranks that share each sequence.")] = 1,
    sequence_parallel: Annotated[bool, typer.Option(help="Shard activations along the sequence.")] = False,
    data_parallel: Annotated[str, typer.Option(help="ddp or fsdp (torch adapter).")] = "ddp",
    zero: Annotated[int | None, typer.Option(help="ZeRO stage (other adapters); default the library's.")] = None,
    precision: Annotated[Literal["float32", "mixed", "bfloat16"], typer.Option(help="Dtypes of the run.")] = "float32",
    recompute: Annotated[Literal["none", "selective", "full"], typer.Option(help="Activations to recompute.")] = "none",
    compile: Annotated[bool, typer.Option(help="Compile the blocks with torch.compile.")] = False,
    steps: int = 32,
    batch: Annotated[int, typer.Option(help="Rows of each step, over all ranks.")] = 4,
    micro_batch: Annotated[int | None, typer.Option(help="Rows of a micro-batch on one rank; default all.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    workers: Annotated[int, typer.Option(help="Processes of each rank that read data.")] = 0,
    learning_rate: float = 1e-4,
    validation_rows: int = 16,
    figures: Annotated[Path | None, typer.Option(help="Write losses and speeds here, as JSON.")] = None,
    records: Annotated[Path | None, typer.Option(help="Write records of steps here, also for TensorBoard.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write traces of torch.profiler here.")] = None,
    states: Annotated[
        str | None, typer.Option(help="Save training states in this directory or URL, and go on from the latest.")
    ] = None,
    every: Annotated[int, typer.Option(help="Steps between training states.")] = 8,
) -> None:
    """Train the model, report the validation loss before and after, and save a checkpoint."""
    context = ps.initialize(
        adapter, tensor=tensor_parallel, context=context_parallel, sequence_parallel=sequence_parallel
    )
    ps.manual_seed(0, context)
    first = all(context.axis(name).rank == 0 for name in ("data", "tensor", "context"))

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows, held_out = (ps.PackedDocuments(token_documents(tokenizer, held), length) for held in (False, True))
    loader = ps.StepLoader(rows, context, batch=batch, micro_batch=micro_batch, workers=workers)

    config, dtypes = ps.read_config(model), PRECISIONS[precision]
    decoder = build_model(config, context).to(dtypes.parameters)
    ps.load_checkpoint(decoder, model, context)
    trainer = ps.load_adapter(adapter).engine(
        decoder,
        ps.AdamW(lr=learning_rate, weight_decay=0.01),
        context,
        precision=dtypes,
        recompute=recompute,
        compile=compile,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: schedule(step, steps)),
        **engine_options(adapter, data_parallel, zero),
    )

    latest = ps.latest_checkpoint(states) if states else None
    if latest is None:
        begin, before = 0, validation_loss(trainer, held_out, validation_rows, context)
    else:
        state = ps.load_training_state(trainer, latest, context, data={"loader": loader})
        begin, before = state.step, state.data["validation_before"]
        if first:
            print(f"going on from {latest}", flush=True)

    sinks: list[Any] = [ps.ProgressBar(steps)]
    if records is not None:
        sinks += [ps.JsonLines(records / "steps.jsonl"), ps.TensorBoard(records / "tensorboard")]
    compute = dtypes.compute or dtypes.parameters
    peak = ps.known_peak_flops(context.device, compute) or ps.measured_peak_flops(context.device, compute)
    profiler = ps.profile_steps(profile, context) if profile else None
    pending, done = None, []
    with (
        ps.Monitor(context, sinks, flops=ps.model_flops(trainer), peak_flops=peak) as monitor,
        profiler or nullcontext(),
    ):
        for step, micro_batches in zip(range(begin, steps), monitor.data(loader)):
            rate = trainer.learning_rate
            with monitor.phase("forward_backward"):
                result = trainer.train_batch(micro_batches)
            with monitor.phase("step"):
                update = trainer.step()
            done.append(monitor.record(step + 1, micro_batches, result, update, learning_rate=rate))
            if profiler:
                profiler.step()
            if states and (step + 1) % every == 0:
                with monitor.phase("save"):
                    if isinstance(pending, ps.PendingSave):
                        pending.wait()
                    pending = ps.save_training_state(
                        trainer,
                        f"{states}/step-{step + 1:08d}",
                        context,
                        step=step + 1,
                        config=config,
                        data={"loader": loader, "validation_before": before},
                        companions=model,
                        asynchronous=True,
                    )
    if isinstance(pending, ps.PendingSave):
        pending.wait()
    after = validation_loss(trainer, held_out, validation_rows, context)

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
            columns = {"losses": "loss", "gradient_norms": "grad_norm", "tokens_per_second": "tokens_per_second"}
            numbers: dict[str, Any] = {"validation_before": before, "validation_after": after}
            numbers |= {title: [getattr(record, name) for record in done] for title, name in columns.items()}
            figures.write_text(json.dumps(numbers, indent=2))
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
def validation_loss(
    trainer: ps.TrainingEngine, rows: ps.PackedDocuments, count: int, context: ps.ParallelContext
) -> float:
    """Return the mean loss over the tokens of `count` rows, which are divided over data-parallel ranks."""
    loader = ps.StepLoader(rows, context, batch=count, micro_batch=1, shuffle=False)
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    for micro_batch in next(iter(loader)):
        labels = (micro_batch["labels"] != -100).sum()
        sums += torch.stack([trainer(**micro_batch) * labels, labels])
    for name in ("data", "context"):
        axis = context.axis(name)
        if axis.collectives is not None:
            sums = axis.collectives.all_reduce(sums)
    total, labels = sums.tolist()
    return total / labels


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
