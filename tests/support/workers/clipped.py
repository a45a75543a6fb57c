"""Clipped steps on each of a library's engines."""

from __future__ import annotations

from pathlib import Path

import polyshard as ps
from polyshard.core.weight_table import stored_parts
from polyshard.weights.gather import gather_shards
from support.workers.on_ranks import build


def clipped_steps(directory: Path, batches: list, adapter: str, engines: tuple, clip: float) -> list[tuple]:
    """For each engine: the gradient norm of every step, and the full weights after them by checkpoint name."""
    context = ps.initialize(adapter, tensor=2, timeout=60)
    rank, size = context.get_data_parallel_rank(), context.get_data_parallel_world_size()
    outcomes = []
    for options in engines:
        model = build(directory, context)
        # With eps of 1, Adam's update is in proportion to the gradient, so that a wrong clip factor shows.
        optimizer = ps.AdamW(lr=1.0, eps=1.0, weight_decay=0.0)
        engine = ps.load_adapter(adapter).engine(model, optimizer, context, max_grad_norm=clip, **options)
        norms = []
        for rows in batches:
            labels = rows.roll(-1, dims=1)
            labels[:, -1] = -100
            engine.train_batch([{"input_ids": rows[rank::size], "labels": labels[rank::size]}])
            norms.append(engine.step().grad_norm)
        weights = {}
        for name, shard in engine.weights():
            entry = engine.table[name]
            full = gather_shards(shard.detach().clone(), entry.layout, context.axis("tensor"))
            weights.update(zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full)))
        outcomes.append((norms, weights if context.rank == 0 else {}))
        engine.close()
    ps.shutdown(context)
    return outcomes
