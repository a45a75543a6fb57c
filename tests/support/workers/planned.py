"""Steps of real engines on real ranks: their peak memory, and the bytes of their collectives."""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import polyshard as ps
from polyshard.layers import collective_operators as operators
from polyshard.planning.decoder import planned_decoder

_SCALARS = 64  # bytes: counts of tokens, losses and norms, which a plan leaves out
_KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
}


# A mode does not see what an operator calls: these implementations are called in its place.
_OPERATORS = {getattr(operators, name): getattr(operators, f"_{name}") for name in _KINDS.values() if name != "send"}


class Collectives(TorchDispatchMode):
    """Payload bytes of torch.distributed's collectives, by axis and operation."""

    def __init__(self, context: ps.ParallelContext) -> None:
        super().__init__()
        # One of several names if an axis has all ranks.
        axes = {"expert_replica": "expert replicas", "expert": "expert"}
        axes |= {name: name for name in ("replica", "tensor", "context")}
        groups = {name: context.axis(axis).group for axis, name in axes.items()}
        self._axes = {group.group_name: name for name, group in groups.items() if group is not None}
        self.counted: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPERATORS:
            with self:
                return _OPERATORS[func](*args, **(kwargs or {}))
        kind = _KINDS.get(func._opname) if func.namespace == "c10d" else None
        if kind is not None:
            tensors = {"all_gather": args[0], "reduce_scatter": args[1], "all_to_all": args[1]}.get(kind, args[0])
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            nbytes = sum(tensor.nbytes for tensor in tensors)
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            if nbytes > _SCALARS:
                self.counted[self._axes[group.group_name], kind] += nbytes
        return func(*args, **(kwargs or {}))


def measured(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case, on each rank: peak bytes of a step above nothing, and the payload bytes of its collectives.

    Without the native kernels of the CPU, whose activations differ from those of a GPU.
    """
    os.environ |= {"CXX": "none", "POLYSHARD_ATTENTION": "cpu_flash"}
    torch.set_num_threads(1)
    return [_measured(**case) for case in cases]


def _measured(
    config: dict[str, Any],
    adapter: str,
    sizes: dict[str, Any],
    options: dict[str, Any],
    precision: ps.Precision,
    recompute: str,
    rows: int,
    length: int,
    micro_batches: int,
    memory: bool,
    traffic: bool,
    **_: Any,
) -> dict[str, Any]:
    context = ps.initialize(adapter, timeout=250, **sizes)
    settings = {"precision": precision, "recompute": recompute, **options}
    local = length // context.get_context_parallel_world_size()
    ids = torch.randint(0, config["vocab_size"], (rows, local))
    batches = [{"input_ids": ids, "labels": ids.roll(-1, -1)}] * micro_batches

    def start() -> Any:
        model = planned_decoder(ps.ModelConfig(**config), context).to(precision.parameters)
        return ps.load_adapter(adapter).engine(model, ps.AdamW(), context, **settings)

    def step(engine: Any) -> None:
        engine.train_batch(batches)
        engine.step()

    def peak_of_a_step() -> int:
        gc.collect()
        with torch.profiler.profile(profile_memory=True) as profile:
            engine = start()
            for _ in range(2):  # DistributedDataParallel makes new buckets in its second step
                step(engine)
            gc.collect()
        held, _ = _memory(profile)
        with torch.profiler.profile(profile_memory=True) as profile:
            step(engine)
        engine.close()
        return held + _memory(profile)[1]

    # The profiler does not see what gloo's threads free, so it may find too much.
    peak = min(peak_of_a_step() for _ in range(4)) if memory else 0
    if not traffic:
        ps.shutdown(context)
        return {"peak": peak}
    engine = start()
    step(engine)
    with Collectives(context) as collectives:
        step(engine)
    engine.close()
    ps.shutdown(context)
    parameters = sum(p.nbytes for p in engine.module.parameters())
    return {"peak": peak, "traffic": dict(collectives.counted), "parameters": parameters}


def _memory(profile: Any) -> tuple[int, int]:
    """Return the bytes that are live at the end, and the largest number of live bytes."""
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return live, peak
