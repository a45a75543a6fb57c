"""Steps that are skipped, gradients that are discarded, and evaluation between backward and step, on each rank."""

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
        skipped, changed, waits = [], [], []
        for step in range(3):
            before = {name: weight.clone() for name, weight in engine.weights()}
            factor = float("inf") if step == 1 and context.get_data_parallel_rank() == 1 else 1.0
            engine.backward(engine(torch.ones(2, 8, dtype=dtype)).sum() * factor)
            waits.append(engine.has_gradients)
            skipped.append(engine.step().skipped)
            waits.append(engine.has_gradients)
            changed.append(any(not torch.equal(before[name], weight) for name, weight in engine.weights()))
        engine.close()
        plain, disturbed = (two_steps(adapter, options, dtype, context, disturb) for disturb in (False, True))
        outcomes.append(
            (
                options,
                skipped,
                changed,
                waits,
                engine.updates,
                plain,
                disturbed,
                *misused(adapter, options, dtype, context),
            )
        )
    ps.shutdown(context)
    return outcomes


def two_steps(adapter: str, options: dict, dtype: torch.dtype, context: ps.ParallelContext, disturb: bool) -> tuple:
    """Weights after two steps, what the engine would save, and norms; with other passes in between if `disturb`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(ps.column_parallel(8, 8, context), ps.row_parallel(8, 8, context)).to(dtype)
    engine = ps.load_adapter(adapter).engine(model, ps.AdamW(lr=0.1), context, **options)
    rows = torch.arange(16.0).view(2, 8).to(dtype) / 16 + context.get_data_parallel_rank()
    norms = []
    for _ in range(2):
        if disturb:
            with engine.accumulate():
                engine.backward(engine(rows).sum() * 3)
            engine.zero_grad()
            engine.backward(engine(rows).sum() * 3)
            engine.zero_grad()
        engine.backward(engine(rows).sin().sum())
        if disturb:
            with torch.no_grad():
                engine(rows)
        norms.append(engine.step().grad_norm)
    if disturb:
        with torch.no_grad():
            engine(rows)
    saved = sorted((p.parameter, p.slot, p.start, p.values.numel()) for p in engine.optimizer_state().pieces)
    held = [(p.parameter, p.start, p.values.clone()) for p in engine.weight_pieces()]
    engine.close()
    return norms, saved, held


def misused(adapter: str, options: dict, dtype: torch.dtype, context: ps.ParallelContext) -> tuple:
    """The errors of using an engine's model in its place, and whether a second engine trains it as the first did."""

    def engine_of(model: torch.nn.Module) -> ps.TrainingEngine:
        return ps.load_adapter(adapter).engine(model, ps.AdamW(lr=0.1), context, **options)

    def error_of(action) -> str:
        try:
            action()
        except ps.ConfigurationError as error:
            return str(error)
        return ""

    def trained(engine: ps.TrainingEngine) -> list[torch.Tensor]:
        engine.backward(engine(rows).sin().sum())
        engine.step()
        weights = [weight.clone() for _, weight in engine.weights()]
        engine.close()
        return weights

    rows = torch.arange(16.0).view(2, 8).to(dtype) / 16 + context.get_data_parallel_rank()
    model, other = (ps.column_parallel(8, 8, context).to(dtype) for _ in range(2))
    for one in (model, other):
        ps.initialize_weights(one, context)
    engine = engine_of(model)
    errors = [error_of(lambda: ps.initialize_weights(model, context))]
    errors.append(error_of(lambda: engine.backward(model(rows).sum())))
    engine.zero_grad()
    engine.backward(engine(rows).sum())
    again_before_step = error_of(lambda: engine.backward(engine(rows).sum()))
    engine.close()
    errors.append(error_of(lambda: ps.initialize_weights(model, context)))
    errors.append(error_of(lambda: engine_of(model)))
    errors.append(again_before_step)
    if errors[3]:
        return errors, True
    first, again = trained(engine_of(other)), trained(engine_of(model))
    return errors, all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
