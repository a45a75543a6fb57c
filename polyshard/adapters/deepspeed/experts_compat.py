"""All code of experts that depends on the version of DeepSpeed, for 0.19."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from polyshard.adapters.shared.quiet import printing_as_log
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError

logger = logging.getLogger(__name__)

with printing_as_log(logger, "DeepSpeed"):
    from deepspeed.module_inject.auto_ep_layer import (
        _AllToAllV,
        combine_from_routed,
        compute_split_plan,
        permute_by_local_expert,
        unpermute_by_local_expert,
    )
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as _groups


class _Marker(MoE):
    """Makes an engine look for experts, which it does if it finds a `MoE` (runtime/engine.py, 0.19.8)."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: the context has set the process groups."""


def group_name(expert_size: int) -> str:
    """Return DeepSpeed's name of the process groups of an expert-parallel size."""
    return f"ep_size_{expert_size}"


def set_expert_groups(context: ParallelContext) -> Callable[[], None]:
    """Give DeepSpeed the process groups of experts, which it keeps in globals; return a function that undoes it.

    Raises:
        ConfigurationError: the context is of another adapter, and has no group of the ranks that hold the same experts.
    """
    name, axes = group_name(context.axis("expert").size), (context.axis("expert"), context.axis("expert_replica"))
    state = _groups._EXPERT_PARALLEL_GROUP, _groups._EXPERT_DATA_PARALLEL_GROUP
    previous = [held.get(name) for held in state]
    if any(axis.group is None for axis in axes):
        raise ConfigurationError(
            "DeepSpeed's engine needs process groups of experts on this context: got one of another adapter. Use "
            "polyshard.initialize('deepspeed', ...)."
        )

    def restore() -> None:
        for held, group in zip(state, previous):
            held.pop(name, None)
            if group is not None:
                held[name] = group

    for held, axis in zip(state, axes):
        held[name] = axis.group
    return restore


@contextlib.contextmanager
def marked_as_experts(model: nn.Module, parameters: Iterable[nn.Parameter], expert_size: int) -> Iterator[None]:
    """Let an engine that is built inside send experts, and reduce their gradients, among the ranks that hold them only.

    Args:
        model: of the engine.
        parameters: the experts that are distributed over the expert axis.
        expert_size: of that axis.
    """
    marked: list[Any] = list(parameters)
    for parameter in marked:
        parameter.allreduce, parameter.group_name = False, group_name(expert_size)
    if not any(parameter.requires_grad for parameter in marked):  # ZeRO then expects parameter groups of experts
        yield
        return
    model.add_module("_polyshard_experts", _Marker(expert_size))
    try:
        yield
    finally:
        del model._modules["_polyshard_experts"]


def split_groups(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], expert_size: int) -> None:
    """Move experts to parameter groups of their own, as ZeRO 1 and 2 require, with unchanged settings.

    Args:
        optimizer: torch's.
        parameters: the experts that are distributed over the expert axis.
        expert_size: of that axis.
    """
    chosen = {id(parameter) for parameter in parameters}
    if not chosen:
        return
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        dense = [p for p in group["params"] if id(p) not in chosen]
        experts = [p for p in group["params"] if id(p) in chosen]
        if dense:
            split.append({**group, "params": dense})
        if experts:
            split.append({**group, "params": experts, "moe": True, "name": group_name(expert_size)})
    optimizer.param_groups[:] = split


def new_grouped_experts(hidden_size: int, local_size: int, count: int) -> tuple[Any, Any]:
    """Return DeepSpeed's experts with grouped matmuls and with one matmul per expert, without memory for weights."""
    with torch.device("meta"):
        grouped, single = (
            GroupedExperts(hidden_size, local_size, count, use_grouped_mm=choice) for choice in (True, False)
        )
    return grouped, single


def run_experts(
    experts: tuple[Any, Any],
    gate_up: torch.Tensor,
    down: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs of DeepSpeed's experts for rows in the order of their sources, in that order.

    Args:
        experts: from `new_grouped_experts`.
        gate_up: `[experts, 2 * local size, hidden]`.
        down: `[experts, hidden, local size]`.
        rows: `[rows, hidden]`, by source rank, and by expert within a source.
        counts: int32 `[sources, experts]`, rows of each expert from each source.
    """
    grouped, single = experts
    sizes = (rows.shape[1], down.shape[2])
    # torch's grouped_mm requires multiples of 16 bytes, and does not support float64.
    aligned = rows.dtype != torch.float64 and all(size * rows.element_size() % 16 == 0 for size in sizes)
    gate, up = gate_up.chunk(2, dim=1)
    sorted_rows, order, padded_counts, count = permute_by_local_expert(rows, counts)
    weights = {"w1": gate, "w3": up, "w2": down}
    y = functional_call(grouped if aligned else single, weights, (sorted_rows, padded_counts))
    return unpermute_by_local_expert(y, order, count)


def exchange_plan(experts: torch.Tensor, num_experts: int, axis: Any) -> Any:
    """Return DeepSpeed's plan of the exchange of rows over the expert axis. A collective.

    Args:
        experts: int64 `[tokens, experts per token]`.
        num_experts: of the layer.
        axis: the expert axis.
    """
    return compute_split_plan(experts, num_experts, axis.size, num_experts // axis.size, axis.group)


def exchange(rows: torch.Tensor, sent: list[int], received: list[int], axis: Any) -> torch.Tensor:
    """Return the rows that the ranks of the expert axis send to this one. A collective."""
    return rows if axis.size == 1 else _AllToAllV.apply(axis.group, rows, sent, received)


def combine(rows: torch.Tensor, weights: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum `[tokens, hidden]` of the outputs of each token, added in float32.

    Args:
        rows: `[tokens * experts per token, hidden]`, sorted by expert.
        weights: `[tokens, experts per token]`.
        order: the positions of the rows among all slots.
    """
    tokens, per_token = weights.shape
    shape = (1, tokens, rows.shape[1])
    combined = combine_from_routed(rows, weights, order, per_token, "post", "weighted_sum", shape)
    return combined.squeeze(0).clone()  # FSDP2 warns of modules that return views
