"""New weights, and loading of tensor-parallel shards into parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, LayoutError
from polyshard.core.weight_sharding import WeightLayout


def new_weight(layout: WeightLayout, parallel_context: ParallelContext, std: float | None) -> nn.Parameter:
    """Return this rank's shard of a new weight, sliced from a full weight drawn from torch's global CPU generator.

    Ranks with equal seeds hold shards of the same full weight at every tensor-parallel size. In a context that loads
    its weights instead (a server's) the shard is uninitialized.

    Args:
        layout: the weight layout.
        parallel_context: this process's parallel context.
        std: standard deviation; None for zeros.
    """
    rank = parallel_context.get_tensor_parallel_rank()
    size = parallel_context.get_tensor_parallel_world_size()
    local = torch.empty(layout.local_shape(rank, size), device=parallel_context.device)
    if parallel_context.initialize_weights and local.device.type != "meta":
        if std is None:
            local.zero_()
        else:
            full = torch.empty(layout.shape, dtype=torch.float32, device="cpu").normal_(0.0, std)
            local.copy_(layout.slice(full, rank, size))
    return nn.Parameter(local)


def check_shard(name: str, value: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise `LayoutError` if a shard does not have the parameter's shape."""
    if tuple(value.shape) != expected:
        raise LayoutError(
            f"{name}: the shard of this rank has the wrong shape: got {tuple(value.shape)}, expected {expected}"
        )


def load_shards(parameters: Mapping[str, nn.Parameter], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy each named shard into its parameter, converting the dtype."""
    with torch.no_grad():
        for name, value in weights:
            check_shard(name, value, tuple(parameters[name].shape))
            parameters[name].copy_(value)


def check_unsharded(model: nn.Module) -> None:
    """Raise `ConfigurationError` if another engine has sharded the parameters, which lasts after it was closed."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_tensor") or hasattr(parameter, "device_mesh"):
            by = "DeepSpeed's ZeRO stage 3" if hasattr(parameter, "ds_tensor") else "FSDP2"
            raise ConfigurationError(
                f"the model belongs to an earlier engine: got {name} as {by} has sharded it, expected parameters as "
                "the factory builds them. Build the model again, and load a checkpoint of the earlier engine into it."
            )
