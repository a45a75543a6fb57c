"""Steps of compiled engines, on each rank."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters

import polyshard as ps
from polyshard.adapters.torch.collectives import _Direct
from support.models.tiny import VOCAB
from support.workers.on_ranks import build

PACKINGS = ((5, 11), (3, 4, 9, 4), (8, 2, 1, 5, 4, 4))  # other numbers of sequences and of tokens


def packed_batches(context: ps.ParallelContext) -> list[dict]:
    """Packed sequences of several numbers and lengths."""
    generator = torch.Generator().manual_seed(context.get_data_parallel_rank())
    found = []
    for lengths in PACKINGS:
        ids = torch.randint(0, VOCAB, (sum(lengths),), generator=generator)
        ids = ps.context_shard(ids, context)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        found.append({"input_ids": ids, "cu_seqlens": bounds, "labels": ids})
    return found


def model_with(directory: Path, context: ps.ParallelContext, **settings: object) -> torch.nn.Module:
    """The tiny model; settings are attributes of its attention modules."""
    model = build(directory, context)
    for block in model.model.layers:
        for name, value in settings.items():
            setattr(block.self_attn, name, value)
    ps.manual_seed(1, context)
    return model.train()


def trained(engine, batches: list[dict]) -> dict:
    """Losses, gradient norms and final weights of one step for each batch, and what torch.compile did."""
    counters.clear()
    entered = mock.Mock()
    names = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    real = {name: getattr(_Direct, name) for name in names}

    def counted(name):
        def run(self, *arguments):
            if self.name == "tensor":
                entered(name)
            return real[name](self, *arguments)

        return run

    losses, norms = [], []
    with mock.patch.multiple(_Direct, **{name: counted(name) for name in names}):
        for batch in batches:
            losses.append(float(engine.train_batch([batch]).loss))
            norms.append(engine.step().grad_norm)
    return {
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
        "weights": {name: weight.detach().clone() for name, weight in engine.weights()},
        "collectives": entered.call_count,
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": counters["graph_break"].total(),
    }


def compiled_steps(
    directory: Path,
    adapter: str,
    sizes: dict,
    cases: list[dict],
    backend: str = "aot_eager",
    steps: int = 3,
    **settings: object,
) -> tuple[list[dict], list[str]]:
    """Outcomes of engines with the options of each case, and the warnings.

    `aot_eager` runs the captured graphs, forward and backward, without generating code, which takes seconds.
    """
    torch._dynamo.config.disable = False
    torch.compile = functools.partial(torch.compile, backend=backend)
    torch._inductor.config.compile_threads = 1  # a pool's processes would import torch first
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("polyshard.training.compile").addHandler(handler)
    context = ps.initialize(adapter, timeout=60, **sizes)
    outcomes = []
    for options in cases:
        torch._dynamo.reset()
        model = model_with(directory, context, **settings)
        engine = ps.load_adapter(adapter).engine(model, ps.AdamW(lr=1e-3), context, **options)
        outcomes.append(trained(engine, packed_batches(context)[:steps]))
        engine.close()
    ps.shutdown(context)
    return outcomes, warnings


def state_of_compiled_into_eager(directory: Path, state: Path) -> tuple[dict, dict]:
    """One step of a compiled engine of torch, saved; the next step there, and in an eager engine of FairScale."""
    torch._dynamo.config.disable = False
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    context = ps.initialize("torch", timeout=60)
    batches = packed_batches(context)
    engine = ps.load_adapter("torch").engine(model_with(directory, context), ps.AdamW(), context, compile=True)
    graphs = trained(engine, batches[:1])["graphs"]
    ps.save_training_state(engine, state, context, step=1, config=ps.read_config(directory))
    continued = trained(engine, batches[1:2])
    engine.close()
    ps.shutdown(context)
    context = ps.initialize("fairscale", timeout=60)
    engine = ps.load_adapter("fairscale").engine(model_with(directory, context), ps.AdamW(), context)
    ps.load_training_state(engine, state, context)
    resumed = trained(engine, batches[1:2])
    engine.close()
    ps.shutdown(context)
    return {**continued, "graphs": graphs}, resumed


def rank_that_crashes_in_a_compiled_block(directory: Path) -> str:
    """Rank 1 crashes in the second step, between two blocks; the error of rank 0."""
    torch._dynamo.config.disable = False
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    context = ps.initialize("torch", timeout=30, tensor=2)
    model = model_with(directory, context)
    engine = ps.load_adapter("torch").engine(model, ps.AdamW(), context, compile=True)
    batch = packed_batches(context)[0]
    engine.train_batch([batch])
    if context.rank == 1:
        model.model.layers[1].register_forward_pre_hook(lambda *_: os._exit(1))
    try:
        engine.train_batch([batch])
    except ps.RankFailureError as error:
        return str(error)
    return "no error"
