"""Training that is saved, interrupted and resumed; it runs on each rank, and the suite checks the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polyshard.attention.context_parallel.shards import context_shard
from polyshard.checkpoint import PendingSave, load_training_state, save_training_state
from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.optimizer import AdamW
from polyshard.launch import initialize, shutdown
from polyshard.layers.initialization import initialize_weights
from polyshard.testing import checks
from polyshard.testing.model import SuiteConfig, SuiteModel

Options = dict[str, Any]
CONFIG = {"model_type": "suite"}


def make(
    adapter: str,
    tensor: int,
    options: Options,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    context_size: int = 1,
) -> tuple[ParallelContext, Any]:
    """Return a context, and an engine around the suite's model."""
    context = initialize(adapter, tensor=tensor, context=context_size, timeout=90)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = SuiteModel(SuiteConfig(dropout=dropout), context)
        initialize_weights(model, context, seed=1)
        optimizer = AdamW(lr=3e-3, weight_decay=0.05)
        return context, load_adapter(adapter).engine(model, optimizer, context, max_grad_norm=0.5, **options)
    finally:
        torch.set_default_dtype(before)


def steps(engine: Any, context: ParallelContext, first: int, last: int) -> list[float]:
    """Run steps `first` to `last` on each rank's part of the batch; return losses averaged over the data axis."""
    losses = []
    batches = checks.batches(SuiteConfig(), last)
    axis = context.axis("data")
    for ids, labels in batches[first:last]:
        rows = len(ids) // axis.size
        mine = slice(axis.rank * rows, (axis.rank + 1) * rows)
        loss = engine(*(context_shard(x[mine], context, dim=1) for x in checks.placed(context, (ids, labels))))
        engine.backward(loss)
        engine.step()
        value = loss.detach().clone()
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
        losses.append(float(value / axis.size))
    return losses


def straight(
    adapter: str, tensor: int, options: Options, count: int, dropout: float = 0.0, context_size: int = 1
) -> tuple[list[float], checks.Named]:
    """Run without interruption; return losses and the final weights."""
    context, engine = make(adapter, tensor, options, dropout, context_size=context_size)
    torch.manual_seed(5 + context.get_data_parallel_rank())
    losses = steps(engine, context, 0, count)
    weights = {name: value.clone() for name, value in engine.weights()}
    shutdown(context)
    return losses, weights


def first_half(
    adapter: str,
    tensor: int,
    options: Options,
    half: int,
    directory: Path,
    dropout: float = 0.0,
    asynchronous: bool = False,
    context_size: int = 1,
) -> list[float]:
    """Train, save the training state, and return the losses."""
    context, engine = make(adapter, tensor, options, dropout, context_size=context_size)
    torch.manual_seed(5 + context.get_data_parallel_rank())
    losses = steps(engine, context, 0, half)
    saved = save_training_state(
        engine,
        directory,
        context,
        step=half,
        config=CONFIG,
        data={"row": half, "rank": context.get_data_parallel_rank()},
        asynchronous=asynchronous,
    )
    if isinstance(saved, PendingSave):
        steps(engine, context, half, half + 2)  # must not affect the saved state
        saved.wait()
    shutdown(context)
    return losses


def all_in_one(
    adapter: str,
    tensor: int,
    options: Options,
    half: int,
    count: int,
    directory: Path,
    dropout: float,
    context_size: int = 1,
) -> tuple[Any, list[float], Any]:
    """Return the results of the uninterrupted and of the interrupted run, each of which initializes again."""
    uninterrupted = straight(adapter, tensor, options, count, dropout, context_size)
    begun = first_half(adapter, tensor, options, half, directory, dropout, context_size=context_size)
    torch.manual_seed(99)
    resumed = second_half(adapter, tensor, options, half, count, directory, dropout, context_size)
    return uninterrupted, begun, resumed


def second_half(
    adapter: str,
    tensor: int,
    options: Options,
    half: int,
    count: int,
    directory: Path,
    dropout: float = 0.0,
    context_size: int = 1,
) -> tuple[list[float], checks.Named, int, Any, list[str]]:
    """Load the state into an engine with overwritten weights, and continue."""
    context, engine = make(adapter, tensor, options, dropout, context_size=context_size)
    with torch.no_grad():  # every weight must come from the saved state
        for piece in engine.weight_pieces():
            piece.values.fill_(7.0)
    engine.weights_written()
    state = load_training_state(engine, directory, context)
    losses = steps(engine, context, half, count)
    weights = {name: value.clone() for name, value in engine.weights()}
    shutdown(context)
    return losses, weights, state.step, state.data, sorted(state.carried)
