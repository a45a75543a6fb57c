"""Where a model's parameters have to stand."""

from __future__ import annotations

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError


def check_devices(model: nn.Module, context: ParallelContext) -> None:
    """Raise `ConfigurationError` where a parameter stands elsewhere than its rank computes.

    Layers of polyshard stand there; plain modules of a factory stand on torch's default device.
    """
    for name, parameter in model.named_parameters():
        if not _same(parameter.device, context.device):
            raise ConfigurationError(
                f"parameter {name} is on {parameter.device}, but this rank computes on {context.device}: call "
                "model.to(parallel_context.device), or build the model under `with parallel_context.device:`"
            )


def _same(one: torch.device, other: torch.device) -> bool:
    """A device without a number stands for any of its type."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)
