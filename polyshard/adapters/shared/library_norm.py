"""Preparation for libraries that compute the gradient norm themselves, and identify shards by an attribute."""

from __future__ import annotations

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError
from polyshard.core.weight_table import WeightTable


def prepare_for_library_norm(
    model: nn.Module, table: WeightTable, context: ParallelContext, library: str, clips: bool
) -> None:
    """Set `tensor_model_parallel` on every parameter, which Megatron and DeepSpeed read and other layers do not set.

    Without the attribute the norm is wrong, and clipping differs between ranks.

    Raises:
        AdapterError: clipping is requested, and tensor-parallel ranks share parts of a weight.
    """
    size = context.get_tensor_parallel_world_size()
    shared = [name for name, entry in table.items() if entry.layout.has_replicas(size)]
    if shared and clips:
        raise AdapterError(
            f"{library}'s gradient norm counts {shared[0]!r} several times, because tensor-parallel ranks share its "
            "KV heads. Use a smaller tensor-parallel size, max_grad_norm=None, or another library's engine"
        )
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = table[name].layout.dim is not None  # pyrefly: ignore  # their convention
