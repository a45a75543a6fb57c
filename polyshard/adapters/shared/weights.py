"""Loading tensor-parallel shards into parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from polyshard.core.errors import LayoutError


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
