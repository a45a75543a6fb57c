"""A pipelined training step, relative to the ideal, to the schedule's own bubble, and to torch's pipeline by hand.

    python benchmarks/pipeline.py [--ranks 2] [--micro-batches 4,8,16] [--json FILE] [--events FILE] [--check]

The ideal is the step of the full model in one process divided by the number of ranks, with all ranks busy at it. The
bubble is that of the schedule's order if each computation took its median time and communication none. "By hand" is the
same stages under `torch.distributed.pipelining` without polyshard's engine, with what a training script logs and the
engine returns, the loss on every rank and the gradient's norm; both alternate in one launch, and the ratio is the
median of that of each round of several launches. Memory is the peak of a step above the level before it. `--check`
exits with status 1 if a step of 50 ms or more takes more than 1.02 of the time by hand. `--events` writes who computed
when, which tools/pipeline_picture.py draws. All of it takes about a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.progress import track
from torch.distributed import pipelining

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import decoder
from report import Report
from timing import ratio_of_rounds

import polyshard as ps
from polyshard.testing import run_ranks
from polyshard.testing.memory import PeakMemory

GOAL, SMALLEST = 1.02, 50.0  # ratio; milliseconds
BATCH, LENGTH = 2, 64
RECORDED = 3  # steps, of which the fastest is drawn
SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "zero-bubble-v", "dualpipe-v")
BY_HAND = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved-1f1b": pipelining.ScheduleInterleaved1F1B,
    "zero-bubble-v": pipelining.ScheduleZBVZeroBubble,
    "dualpipe-v": pipelining.ScheduleDualPipeV,
}


def config(layers: int) -> ps.ModelConfig:
    return ps.ModelConfig(
        model_type="llama",
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )


def micro_batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2048, (count, BATCH, LENGTH + 1), generator=generator)
    return [{"input_ids": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous()} for t in tokens]


class HandStage(torch.nn.Module):
    """A stage as torch's schedules call it."""

    def __init__(self, stage: Any, first: bool) -> None:
        super().__init__()
        self.stage, self.first = stage, first

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.stage(x, positions) if self.first else self.stage(None, positions, inputs_embeds=x)


def by_hand(stages: ps.Stages, context: ps.ParallelContext, schedule: str, count: int) -> Any:
    """Return a function that runs a step with torch's schedule and SGD, and returns loss and gradient norm."""
    batches = micro_batches(count)
    tokens = count * BATCH * LENGTH
    axis, total = context.axis("pipeline"), stages.plan.num_stages
    hidden = torch.empty(BATCH, LENGTH, 256, requires_grad=True)
    made = [
        pipelining.PipelineStage(
            HandStage(stage, number == 0),
            number,
            total,
            context.device,
            input_args=batches[0]["input_ids"] if number == 0 else hidden,
            output_args=hidden,
            group=axis.group,
        )
        for number, stage in zip(stages.numbers, stages)
    ]

    def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ps.lm_loss(output, stages.compute_logits, labels, context, reduction="sum") / tokens

    made_by = BY_HAND[schedule]
    runner = made_by(made[0] if len(made) == 1 else made, n_microbatches=count, loss_fn=loss, scale_grads=False)
    optimizer = torch.optim.SGD(stages.parameters(), lr=1e-3)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    positions = torch.arange(LENGTH).expand_as(ids).contiguous()

    def step() -> tuple[float, float]:
        arguments = (ids,) if 0 in stages.numbers else ()
        target = labels if stages.last is not None else None
        losses: list[torch.Tensor] = []
        runner.step(*arguments, target=target, losses=losses, positions=positions, return_outputs=False)
        total = torch.stack(losses).detach().sum() if losses else torch.zeros(())
        dist.all_reduce(total, group=axis.group)
        norm = torch.nn.utils.get_total_norm([p.grad for p in stages.parameters() if p.grad is not None])
        square = norm.square()
        dist.all_reduce(square, group=axis.group)
        optimizer.step()
        optimizer.zero_grad()
        return float(total), float(square.sqrt())

    return step


def measured(schedule: str, count: int, layers: int, rounds: int) -> dict[str, Any]:
    """Times of a step by polyshard, by hand and of the full model, memory, and events; on each rank."""
    context = ps.initialize("torch", pipeline=int(os.environ["WORLD_SIZE"]))
    ranks = context.layout.pipeline
    plan = ps.pipeline_plan(layers, ranks, schedule=schedule)  # type: ignore[arg-type]
    sgd = ps.TorchOptimizer(torch.optim.SGD, lr=1e-3, weight_decay=0.0)
    batches = micro_batches(count)

    def built() -> ps.Stages:
        stages = ps.build_stages(decoder.build_model, config(layers), context, plan)
        ps.initialize_weights(stages, context)
        return stages

    engine: Any = ps.load_adapter("torch").engine(built(), sgd, context, max_grad_norm=None, check_random=False)
    alone = ps.GroupContext(layout=ps.ParallelLayout(), device=torch.device("cpu"), linear=context.linear)
    whole = decoder.build_model(config(layers), alone)
    ps.initialize_weights(whole, alone)
    single = ps.load_adapter("torch").engine(whole, sgd, alone, max_grad_norm=None, check_random=False)

    def ours() -> None:
        engine.train_batch(batches)
        engine.step()

    def ideal() -> None:
        single.train_batch(batches)
        single.step()

    actions: dict[str, Any] = {"polyshard": ours, "by hand": by_hand(built(), context, schedule, count), "whole": ideal}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            action = actions[name]
            dist.barrier()
            started = time.perf_counter()
            action()
            dist.barrier()
            times[name].append(time.perf_counter() - started)
    with PeakMemory() as memory:
        ours()
    recorded = []
    for _ in range(RECORDED):
        engine._pipeline.schedule.events = events = []
        dist.barrier()
        engine.train_batch(batches)
        recorded.append([asdict(event) for event in events])
    found = {name: spent[1:] for name, spent in times.items()}
    ps.shutdown(context)
    return {"times": found, "memory": memory.bytes, "events": recorded}


def fastest(runs: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return the events of each rank in the fastest of the recorded steps, which other programs disturbed least."""
    steps = [step for run in runs for step in zip(*(result["events"] for result in run))]

    def span(step: tuple[list[dict[str, Any]], ...]) -> float:
        events = [event for of_rank in step for event in of_rank]
        return max(event["stop"] for event in events) - min(event["start"] for event in events)

    return list(min(steps, key=span))


def bubble(of_ranks: list[list[dict[str, Any]]]) -> float:
    """Return the time of a schedule over its work per rank, if each computation takes its median time."""
    kinds: dict[tuple[str, int], list[float]] = {}
    for event in (event for events in of_ranks for event in events):
        kinds.setdefault((event["kind"], event["stage"]), []).append(event["stop"] - event["start"])
    cost = {kind: statistics.median(spent) for kind, spent in kinds.items()}
    last = max(stage for _, stage in cost)
    done: dict[tuple[str, int, int], float] = {}
    clocks = [0.0] * len(of_ranks)
    waiting = [sorted(events, key=lambda event: event["start"]) for events in of_ranks]
    while any(waiting):
        for rank, events in enumerate(waiting):
            while events:
                kind, stage, index = (events[0][name] for name in ("kind", "stage", "micro_batch"))
                needs = {
                    "forward": ("forward", stage - 1, index) if stage else None,
                    "loss": ("forward", stage, index),
                    "backward": ("loss", last, index) if stage == last else ("backward", stage + 1, index),
                    "weights": ("backward", stage, index),
                }[kind]
                if needs is not None and needs not in done:
                    break
                ready = 0.0 if needs is None else done[needs]
                clocks[rank] = max(clocks[rank], ready) + cost[kind, stage]
                done[kind, stage, index] = clocks[rank]
                events.pop(0)
    total = sum(cost[kind, stage] for kind, stage, _ in done)
    return max(clocks) / (total / len(of_ranks))


def main(
    ranks: int = 2,
    layers: int = 8,
    rounds: Annotated[int, typer.Option(help="Of each launch.")] = 5,
    launches: Annotated[int, typer.Option(help="Of each case; one process may be faster or slower throughout.")] = 3,
    micro_batches: Annotated[str, typer.Option(help="Numbers of micro-batches, separated by commas.")] = "4,8,16",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    events_file: Annotated[Path | None, typer.Option("--events", help="Write who computed when here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with status 1 if a goal is missed.")] = False,
) -> None:
    """Measure every schedule with every number of micro-batches."""
    report = Report(("schedule", "micro-batches", "ms", "over ideal", "bubble", "over bubble", "over by hand", "MiB"))
    drawn: dict[str, Any] = {}
    cases = [(schedule, int(count)) for schedule in SCHEDULES for count in micro_batches.split(",")]
    for schedule, count in track(cases, "measuring", transient=True):
        runs = [run_ranks(measured, ranks, schedule, count, layers, rounds, timeout=900) for _ in range(launches)]
        times = {name: [seconds for run in runs for seconds in run[0]["times"][name]] for name in runs[0][0]["times"]}
        ours, whole = (statistics.median(times[name]) for name in ("polyshard", "whole"))
        over_hand = ratio_of_rounds(times, "polyshard", "by hand")
        events = fastest(runs)
        own = bubble(events)
        row = {
            "schedule": schedule,
            "micro-batches": count,
            "ms": round(ours * 1e3, 1),
            "over ideal": round(ours / (whole / ranks), 3),
            "bubble": round(own, 3),
            "over bubble": round(ours / (whole / ranks) / own, 3),
            "over by hand": round(over_hand, 3),
            "MiB": round(max(result["memory"] for run in runs for result in run) / 2**20, 1),
        }
        report.add(**row)
        if row["over by hand"] > GOAL and row["ms"] >= SMALLEST:
            report.missed.append(f"{schedule}, {count} micro-batches: {row['over by hand']} of the time by hand")
        if count == 8 or schedule not in drawn:
            drawn[schedule] = events
    report.show()
    report.save(json_file, torch.device("cpu"))
    if events_file is not None:
        events_file.write_text(json.dumps(drawn) + "\n")
    if check and report.missed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
