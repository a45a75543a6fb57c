"""Layouts that are planned and run: as arguments of the worker, and as the strategy that is planned for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import polyshard as ps
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.planning.communication import payload_of
from polyshard.planning.decoder import planned_decoder
from polyshard.planning.library import Library
from polyshard.planning.memory import Memory, memory_of
from polyshard.planning.strategy import CASTS, MASTERS, Strategy
from polyshard.planning.trace import Trace, record

FLOAT32 = ps.Precision()
NARROW = ps.Precision(parameters=torch.bfloat16, reduce=torch.bfloat16)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
}
LLAMA_405B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
RING = {**CONFIG, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}  # two ranks cannot share heads
EXPERTS = {**CONFIG, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
FSDP = {"data_parallel": "fsdp"}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}


def case(**changes: Any) -> dict[str, Any]:
    """Return a case of `support.workers.planned.measured`."""
    found: dict[str, Any] = {"config": CONFIG, "adapter": "torch", "sizes": {}, "options": {}, "precision": FLOAT32}
    found |= {"recompute": "none", "rows": 2, "length": 128, "micro_batches": 1, "memory": True, "traffic": True}
    return {**found, **changes}


def oss(stage: int, **changes: Any) -> dict[str, Any]:
    """Return a case of FairScale, whose collectives are others than those that are planned."""
    options = {"zero_stage": stage}
    return case(adapter="fairscale", sharding=f"zero{stage}", options=options, traffic=False, **changes)


ON_TWO = {
    "DDP": case(),
    "DDP, two micro-batches": case(micro_batches=2),
    "DDP, masters": case(precision=MASTERS),
    "DDP, masters, two micro-batches": case(precision=MASTERS, micro_batches=2, recompute="full"),
    "FSDP2, casts": case(options=FSDP, precision=CASTS, recompute="full", memory=False),
    "FSDP2, two micro-batches": case(options=FSDP, micro_batches=2, memory=False),
    "tensor": case(sizes={"tensor": 2}, memory=False),
    "sequence": case(sizes=SEQUENCE, recompute="selective", memory=False),
    "context": case(sizes={"context": 2}, recompute="full", memory=False),
    "context by a ring": case(sizes={"context": 2}, config=RING, memory=False),
    "OSS with DDP, two micro-batches": oss(1, micro_batches=2),
    "OSS with ShardedDDP, masters": oss(2, precision=NARROW, recompute="full"),
}
ON_FOUR = {
    "tensor and data": case(sizes={"tensor": 2}, memory=False),
    "sequence, FSDP2 over data": case(sizes=SEQUENCE, options=FSDP, recompute="full", memory=False),
    "experts": case(sizes={"expert": 2}, config=EXPERTS, micro_batches=2, memory=False),
    "sequence and experts": case(sizes={**SEQUENCE, "expert": 2}, config=EXPERTS, recompute="full", memory=False),
    "sequence and context, two micro-batches": case(sizes={**SEQUENCE, "context": 2}, micro_batches=2, memory=False),
}


def planned(chosen: dict[str, Any], ranks: int) -> tuple[Strategy, Trace]:
    """Return the strategy of a case, and its trace."""
    layout = ParallelLayout.for_world(ranks, **chosen["sizes"])
    strategy = Strategy(
        layout=layout,
        sharding=chosen.get("sharding", chosen["options"].get("data_parallel", "ddp").replace("ddp", "data")),
        precision=chosen["precision"],
        recompute=chosen["recompute"],
        rows=chosen["rows"],
        micro_batches=chosen["micro_batches"],
    )
    options = {"rows": chosen["rows"], "length": chosen["length"], "recompute": chosen["recompute"]}
    dtype = chosen["precision"].compute_dtype
    trace, _ = record(planned_decoder, ps.ModelConfig(**chosen["config"]), layout, dtype=dtype, **options)
    return strategy, trace


def payload(chosen: dict[str, Any], ranks: int) -> dict[tuple[str, str], int]:
    """Return the planned bytes of the collectives of a step."""
    return one_name(chosen, ranks, payload_of(*planned(chosen, ranks)))


def one_name(chosen: dict[str, Any], ranks: int, traffic: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Return bytes by axis and operation, under one name for axes that have the same ranks."""
    same = ParallelLayout.for_world(ranks, **chosen["sizes"]).data == 1
    found: dict[tuple[str, str], int] = {}
    for (axis, kind), nbytes in traffic.items():
        key = ("replica" if same and axis == "context" else axis, kind)
        found[key] = found.get(key, 0) + nbytes
    return found


def memory(chosen: dict[str, Any], ranks: int) -> Memory:
    """Return the planned memory."""
    strategy, trace = planned(chosen, ranks)
    return memory_of(strategy, trace, library=Library.of(ps.load_adapter(chosen["adapter"])))
