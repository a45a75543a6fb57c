"""For engines that compute the gradient's norm themselves, telling shards from copies by an attribute."""

from __future__ import annotations

from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError
from polyshard.core.weight_table import WeightTable


def prepare_for_library_norm(
    model: nn.Module, table: WeightTable, context: ParallelContext, library: str, clips: bool
) -> None:
    """Mark shards with `tensor_model_parallel`, as Megatron and DeepSpeed read it; layers of other libraries do not.

    Without the mark the norm is wrong, and clipping differs from rank to rank.

    Raises:
        AdapterError: clipping is asked for, and some weight has parts that several ranks hold.
    """
    size = context.get_tensor_parallel_world_size()
    shared = [name for name, entry in table.items() if entry.layout.has_replicas(size)]
    if shared and clips:
        raise AdapterError(
            f"{library}'s gradient norm counts {shared[0]!r} several times, since tensor-parallel ranks share its KV "
            "heads: use a smaller tensor-parallel size, max_grad_norm=None, or another library's engine"
        )
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = table[name].layout.dim is not None  # pyrefly: ignore  # their convention
