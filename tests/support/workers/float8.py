"""Training in float8, on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import polyshard as ps
from support.workers.precision import run, start

STEPS = 8
Case = tuple[ps.Precision, dict]  # precision, options of the engine


def curves(directory: Path, sizes: dict, cases: list[Case]) -> list[list[float]]:
    """Losses of each case, at one parallel layout."""
    context = ps.initialize("torch", timeout=60, **sizes)
    losses = []
    for precision, options in cases:
        engine = start(directory, context, precision, options)
        losses.append(run(engine, context, 0, STEPS))
        engine.close()
    ps.shutdown(context)
    return losses


def sharded_layers(
    recipe: str, weights: list[torch.Tensor], x: torch.Tensor, gradient: torch.Tensor, sizes: dict
) -> list:
    """Output and gradients of a column-parallel and a row-parallel layer without biases."""
    from polyshard.adapters.torch.float8 import apply_float8

    context = ps.initialize("torch", timeout=60, **sizes)
    rank = context.axis("tensor").rank
    up, down = weights
    column = ps.column_parallel(up.shape[1], up.shape[0], context)
    row = ps.row_parallel(down.shape[1], down.shape[0], context)
    with torch.no_grad():
        column.weight.copy_(up.chunk(2, 0)[rank])
        row.weight.copy_(down.chunk(2, 1)[rank])
    model = nn.Sequential(column, nn.GELU(), row)
    apply_float8(model, recipe, context)
    if context.layout.sequence_parallel:
        x, gradient = x.chunk(2)[rank], gradient.chunk(2)[rank]
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(gradient)
    ps.shutdown(context)
    return [y.detach(), leaf.grad, column.weight.grad, row.weight.grad]


def refusals(directory: Path, precision: ps.Precision) -> dict[str, str]:
    """Errors of the other engines, and of exact mode."""
    errors = {}
    for adapter, settings in (("megatron", {}), ("deepspeed", {}), ("fairscale", {}), ("torch", {"exact": True})):
        context = ps.initialize(adapter, timeout=60, **settings)
        try:
            start(directory, context, precision, {})
        except (ps.AdapterError, ps.ConfigurationError) as error:
            errors[adapter] = str(error)
        ps.shutdown(context)
    return errors


def outcomes(directory: Path, cases: dict[str, tuple[dict, list[Case]]], recipe: str, *layers: Any) -> dict[str, Any]:
    """All of the above; the layers are computed at the layouts of `cases` that are not data parallel."""
    return {
        "curves": {name: curves(directory, *case) for name, case in cases.items()},
        "layers": [sharded_layers(recipe, *layers, sizes) for sizes, _ in cases.values() if sizes],
        "refusals": refusals(directory, ps.Precision(float8=recipe)),
    }
