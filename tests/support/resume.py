"""Training on ranks with saves and loads in between, for the tests of training states."""

import torch
import torch.distributed as dist

import polyshard as ps
from polyshard.testing import checks
from polyshard.testing.model import SuiteConfig, SuiteModel

SETTINGS = {"lr": 3e-3, "weight_decay": 0.05}
CONFIG = {"model_type": "suite"}


def make(adapter, tensor, options, dropout=0.0):
    context = ps.initialize(adapter, tensor=tensor, timeout=90)
    config = SuiteConfig(dropout=dropout)
    model = SuiteModel(config, context)
    ps.initialize_weights(model, context, seed=1)
    engine = ps.load_adapter(adapter).engine(model, ps.AdamW(**SETTINGS), context, max_grad_norm=0.5, **options)
    return context, engine


def steps(engine, context, first, last):
    """Losses of steps `first` to `last`, averaged over the data axis; each rank takes its rows of the batch."""
    losses = []
    batches = checks.batches(SuiteConfig(), last)
    axis = context.axis("data")
    for ids, labels in batches[first:last]:
        rows = len(ids) // axis.size
        mine = slice(axis.rank * rows, (axis.rank + 1) * rows)
        loss = engine(ids[mine], labels[mine])
        engine.backward(loss)
        engine.step()
        value = loss.detach().clone()
        if axis.size > 1:
            dist.all_reduce(value, group=axis.group)
        losses.append(float(value / axis.size))
    return losses


def straight(adapter, tensor, options, count, dropout=0.0):
    context, engine = make(adapter, tensor, options, dropout)
    torch.manual_seed(5 + context.get_data_parallel_rank())
    losses = steps(engine, context, 0, count)
    weights = {name: value.clone() for name, value in engine.weights()}
    ps.shutdown(context)
    return losses, weights


def first_half(adapter, tensor, options, half, directory, dropout=0.0, asynchronous=False):
    context, engine = make(adapter, tensor, options, dropout)
    torch.manual_seed(5 + context.get_data_parallel_rank())
    losses = steps(engine, context, 0, half)
    saved = ps.save_training_state(
        engine,
        directory,
        context,
        step=half,
        config=CONFIG,
        data={"row": half, "rank": context.get_data_parallel_rank()},
        asynchronous=asynchronous,
    )
    if asynchronous:
        steps(engine, context, half, half + 2)  # must not show in what is written
        saved = saved.wait()
    ps.shutdown(context)
    return losses


def all_in_one(adapter, tensor, options, half, count, directory, dropout):
    """The run that is not interrupted, and the one that is; each initialises anew."""
    whole = straight(adapter, tensor, options, count, dropout)
    begun = first_half(adapter, tensor, options, half, directory, dropout)
    torch.manual_seed(99)
    return whole, begun, second_half(adapter, tensor, options, half, count, directory, dropout)


def second_half(adapter, tensor, options, half, count, directory, dropout=0.0):
    context, engine = make(adapter, tensor, options, dropout)
    with torch.no_grad():  # nothing of the new run's own weights may survive
        for piece in engine.weight_pieces():
            piece.values.fill_(7.0)
    engine.weights_written()
    state = ps.load_training_state(engine, directory, context)
    losses = steps(engine, context, half, count)
    weights = {name: value.clone() for name, value in engine.weights()}
    ps.shutdown(context)
    return losses, weights, state.step, state.data, sorted(state.carried)
