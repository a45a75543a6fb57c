"""Steps with and without recomputation, on each rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import polyshard as ps
from support.models.tiny import VOCAB
from support.workers.on_ranks import build


def recomputed_steps(directory: Path, adapter: str, sizes: dict, engines: tuple) -> list[tuple]:
    """For each engine: its options, and the weights after two steps without, with selective and full recomputation."""
    context = ps.initialize(adapter, timeout=60, **sizes)
    outcomes = []
    for options in engines:
        weights = []
        for mode in ("none", "selective", "full"):
            model = build(directory, context)
            for module in model.modules():
                if isinstance(module, ps.TrainableFlashAttention):
                    module.spec = dataclasses.replace(module.spec, dropout=0.3)
                    module._call_spec = dataclasses.replace(module._call_spec, dropout=0.3)
            ps.manual_seed(1, context)
            engine = ps.load_adapter(adapter).engine(model, ps.AdamW(lr=1e-2), context, recompute=mode, **options)
            model.train()
            generator = torch.Generator().manual_seed(context.get_data_parallel_rank())
            for _ in range(2):
                ids = torch.randint(0, VOCAB, (2, 16), generator=generator)
                ids = ps.context_shard(ids, context, dim=1) if context.get_context_parallel_world_size() > 1 else ids
                engine.train_batch([{"input_ids": ids, "labels": ids}])
                engine.step()
            weights.append({name: weight.detach().clone() for name, weight in engine.weights()})
            engine.close()
        outcomes.append((options, *weights))
    ps.shutdown(context)
    return outcomes
