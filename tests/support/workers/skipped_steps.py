"""A step with a gradient that is not finite on one rank, between two ordinary steps, on each rank."""

from __future__ import annotations

import torch

import polyshard as ps


def steps(adapter: str, engines: tuple[dict, ...], dtype: torch.dtype = torch.float32) -> list[tuple]:
    """For each engine: whether each step was skipped, and whether it changed the weights."""
    context = ps.initialize(adapter, timeout=60)
    outcomes = []
    for options in engines:
        torch.manual_seed(0)
        model = ps.column_parallel(8, 8, context).to(dtype)
        engine = ps.load_adapter(adapter).engine(model, ps.AdamW(lr=0.1), context, **options)
        skipped, changed = [], []
        for step in range(3):
            before = {name: weight.clone() for name, weight in engine.weights()}
            factor = float("inf") if step == 1 and context.get_data_parallel_rank() == 1 else 1.0
            engine.backward(engine(torch.ones(2, 8, dtype=dtype)).sum() * factor)
            skipped.append(engine.step().skipped)
            changed.append(any(not torch.equal(before[name], weight) for name, weight in engine.weights()))
        outcomes.append((options, skipped, changed, engine.updates))
        engine.close()
    ps.shutdown(context)
    return outcomes
