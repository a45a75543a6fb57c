"""All code of experts that depends on the version of Megatron-Core, for 0.16 to 0.19."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch.func import functional_call
from torch.nn import functional as F

from polyshard.adapters.megatron.compat import ColumnParallelLinear, RowParallelLinear
from polyshard.adapters.shared.quiet import printing_as_log
from polyshard.adapters.shared.unbind import unbind
from polyshard.core.experts import ExpertBank

logger = logging.getLogger(__name__)

with printing_as_log(logger, "Megatron"):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.token_dispatcher import (
        MoEAllGatherTokenDispatcher,
        MoEAlltoAllTokenDispatcher,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

TokenDispatcher = Literal["alltoall", "allgather"]


class _HostAlltoAll(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher on a rank that computes on the CPU.

    Megatron's copies the splits to the host on a CUDA stream, and leaves those of CPU tensors as tensors, which
    `all_to_all_single` rejects: transformer/moe/moe_utils.py, maybe_move_tensor_to_cpu (0.16.1 and 0.19.2).
    """

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            self.input_splits, self.output_splits = (
                splits.tolist() if torch.is_tensor(splits) else splits
                for splits in (self.input_splits, self.output_splits)
            )
        return tokens_per_expert


def experts_config(bank: ExpertBank, expert_size: int, dtype: torch.dtype) -> Any:
    """Return Megatron's config of a bank's experts and of their dispatcher.

    Args:
        bank: the experts.
        expert_size: of the expert axis.
        dtype: of the parameters.
    """
    known = {field.name for field in fields(TransformerConfig)}
    settings: dict[str, Any] = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "hidden_size": bank.hidden_size,
        "ffn_hidden_size": bank.expert_size,
        "moe_ffn_hidden_size": bank.expert_size,
        "num_moe_experts": bank.num_experts,
        "moe_router_topk": 1,  # each forward pass sets it
        "moe_router_pre_softmax": True,  # required for 1; no router is built
        "moe_router_load_balancing_type": "none",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "params_dtype": dtype,
        "expert_model_parallel_size": expert_size,
        # Renamed in 0.19. The default warns that it is deprecated.
        "cuda_graph_modules" if "cuda_graph_modules" in known else "cuda_graph_scope": [],
    }
    return TransformerConfig(**settings)


def new_dispatcher(
    kind: TokenDispatcher, config: Any, local_experts: Sequence[int], group: Any, device: torch.device
) -> Any:
    """Return Megatron's token dispatcher over the expert axis.

    Args:
        kind: of the dispatcher.
        config: from `experts_config`.
        local_experts: the experts of this rank.
        group: the expert axis.
        device: on which this rank computes.
    """
    groups = ProcessGroupCollection(ep=group, tp_ep=group, expt_tp=None)
    arguments = {"config": config, "pg_collection": groups}
    count, indices = len(local_experts), list(local_experts)
    if kind == "allgather":
        return MoEAllGatherTokenDispatcher(count, indices, **arguments)
    if device.type == "cuda":
        return MoEAlltoAllTokenDispatcher(count, indices, **arguments)
    with _without_stream():
        return _HostAlltoAll(count, indices, **arguments)


def new_sequential_mlp(config: Any, count: int, tensor_group: Any, expert_group: Any) -> Any:
    """Return Megatron's experts without memory for their weights, which `run_experts` passes in each call."""
    groups = ProcessGroupCollection(ep=expert_group, expt_tp=tensor_group, expt_dp=expert_group)
    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    with torch.device("meta"):
        return SequentialMLP(count, config, layers, pg_collection=groups)


def run_experts(
    experts: Any,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    rows: torch.Tensor,
    counts: torch.Tensor,
    probabilities: torch.Tensor,
) -> torch.Tensor:
    """Return the outputs of Megatron's experts with the given weights, a partial sum of the tensor axis.

    Args:
        experts: from `new_sequential_mlp`.
        gate_up: `[experts, 2 * local size, hidden]`.
        down: `[experts, hidden, local size]`.
        rows: `[rows, hidden]`, sorted by expert.
        counts: int64 `[experts]`, rows of each expert.
        probabilities: `[rows]`, which scale the outputs.
    """
    # `unbind`, since indexing gives each expert a gradient of the whole bank.
    weights = {}
    for index, (first, second) in enumerate(zip(unbind(gate_up), unbind(down))):
        weights[f"local_experts.{index}.linear_fc1.weight"] = first
        weights[f"local_experts.{index}.linear_fc2.weight"] = second
    output, _ = functional_call(experts, weights, (rows, counts, probabilities))
    return output


def mark_experts(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let Megatron average the gradients of experts over the ranks that hold them, before it wraps the model."""
    for parameter in parameters:
        parameter.allreduce = False  # pyrefly: ignore  # Megatron's attribute


def average_expert_gradients(chunk: Any, holders: int) -> None:
    """Let a chunk divide the summed gradients of experts by the number of ranks that hold them.

    Megatron divides them by the number of all replicas (distributed_data_parallel.py:287, 0.16.1), since the backward
    pass adds up the tokens of the expert axis. polyshard's experts have divided their gradients by that axis' size.
    """
    for buffer in chunk.expert_parallel_buffers:
        for bucket in buffer.buckets:
            bucket.gradient_scaling_factor = 1.0 / holders


@contextlib.contextmanager
def _without_stream() -> Iterator[None]:
    """Keep the all-to-all dispatcher from creating a CUDA stream: transformer/moe/token_dispatcher.py:446 (0.16.1)."""
    dispatcher: Any = MoEAlltoAllTokenDispatcher
    previous = dispatcher.cuda_dtoh_stream
    dispatcher.cuda_dtoh_stream = torch.cpu.current_stream()
    try:
        yield
    finally:
        dispatcher.cuda_dtoh_stream = previous
