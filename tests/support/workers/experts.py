"""What tests of experts run on each rank. Top-level functions: other processes import them."""

from __future__ import annotations

from pathlib import Path

import moe
import torch

import polyshard as ps


def build(directory: Path, context: ps.ParallelContext, balance: ps.Balance | None = None) -> moe.Decoder:
    model = moe.build_model(ps.read_config(directory), context, balance)
    ps.load_checkpoint(model, directory, context)
    return model


def one_step(directory: Path, results: Path, ids: torch.Tensor, labels: torch.Tensor, layouts: dict) -> dict:
    """One step of SGD for each layout, from the rows of this rank; the weights after it are saved under its name."""
    found = {}
    for name, (sizes, options) in layouts.items():
        context = ps.initialize("torch", timeout=60, **sizes)
        model = build(directory, context)
        sgd = ps.TorchOptimizer(torch.optim.SGD, lr=1.0)
        engine = ps.load_adapter("torch").engine(model, sgd, context, max_grad_norm=0.5, **options)
        axis = context.axis("data")
        rows = [row for row in range(len(ids)) if row % axis.size == axis.rank]
        batches = [
            {
                "input_ids": ps.context_shard(ids[row : row + 1], context, dim=1),
                "labels": ps.context_shard(labels[row : row + 1], context, dim=1),
            }
            for row in rows
        ]
        result = engine.train_batch(batches)
        step = engine.step()
        ps.save_checkpoint(engine, results / name, context, config=ps.read_config(directory))
        found[name] = (float(result.loss), step.grad_norm)
        engine.close()
        ps.shutdown(context)
    return found
