"""Steps whose communication overlaps with computation, and the order in which both happen, on each rank."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import polyshard as ps
from support.models.tiny import VOCAB
from support.workers.on_ranks import build


def overlapped_steps(directory: Path, adapter: str, cases: list[tuple[dict, dict]]) -> list[tuple]:
    """For each case, options without and with overlap: the weights after three steps of two micro-batches with each."""
    context = ps.initialize(adapter, timeout=60)
    optimizer = ps.AdamW(lr=1e-2, eps=1e-3)  # with the usual epsilon Adam amplifies roundings of small gradients
    outcomes = []
    for options in cases:
        weights = []
        for chosen in options:
            engine = ps.load_adapter(adapter).engine(build(directory, context), optimizer, context, **chosen)
            generator = torch.Generator().manual_seed(context.rank)
            for _ in range(3):
                ids = torch.randint(0, VOCAB, (2, 2, 16), generator=generator)
                engine.train_batch([{"input_ids": rows, "labels": rows} for rows in ids])
                engine.step()
            weights.append({name: weight.detach().clone() for name, weight in engine.weights()})
            engine.close()
        outcomes.append(tuple(weights))
    if adapter == "torch":
        unused = {"ddp_options": {"find_unused_parameters": True}}
        engine = ps.load_adapter(adapter).engine(build(directory, context), optimizer, context, **unused)
        with pytest.raises(ps.ConfigurationError, match="Pass static_graph=True"):
            engine.train_batch([{"input_ids": torch.ones(1, 4).long(), "labels": torch.ones(1, 4).long()}])
    if adapter == "deepspeed":
        wrong = {"zero_optimization": {"reduce_bucket_size": -1}}
        with pytest.raises(ps.ConfigurationError, match="rejects: got reduce_bucket_size=-1 "):
            ps.load_adapter(adapter).engine(build(directory, context), optimizer, context, config=wrong)
    ps.shutdown(context)
    return outcomes


def order_of_reductions(directory: Path) -> list[str]:
    """What happens in one backward pass of parameters with masters: gradients of blocks, and messages."""
    context = ps.initialize("torch", timeout=60)
    model = build(directory, context).to(torch.bfloat16)
    events: list[str] = []
    for index, block in enumerate(model.model.layers):
        block.register_full_backward_hook(lambda *_, name=f"block {index}": events.append(name))
    engine = ps.load_adapter("torch").engine(model, ps.AdamW(), context, ddp_options={"bucket_cap_mb": 0.01})
    ids = torch.randint(0, VOCAB, (2, 16))
    loss = engine(ids, labels=ids)
    real = dist.all_reduce

    def all_reduce(*arguments, async_op: bool = False, **others):
        events.append("message" if async_op else "wait")
        return real(*arguments, async_op=async_op, **others)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        engine.backward(loss)
    ps.shutdown(context)
    return events


def order_of_gathers(directory: Path, options: dict) -> list[str]:
    """What happens in one forward pass under FSDP2: all-gathers and blocks."""
    context = ps.initialize("torch", timeout=60)
    model = build(directory, context)
    engine = ps.load_adapter("torch").engine(
        model, ps.AdamW(), context, data_parallel="fsdp", fsdp_options={"reshard_after_forward": True, **options}
    )
    events: list[str] = []
    for index, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, name=f"block {index}": events.append(name))
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    real = groups.foreach_all_gather

    def gather(*arguments, **others):
        events.append("gather")
        return real(*arguments, **others)

    ids = torch.randint(0, VOCAB, (2, 16))
    with mock.patch.object(groups, "foreach_all_gather", gather):
        engine(ids)
    ps.shutdown(context)
    return events
