"""The optimizers that Megatron-Core creates itself: AdamW and SGD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from polyshard.core.errors import AdapterError
from polyshard.core.optimizer import AdamW, OptimizerFactory, TorchOptimizer
from polyshard.core.parameter_groups import ParameterGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnOptimizer:
    """An optimizer of Megatron's.

    Attributes:
        fields: of its `OptimizerConfig`.
        lr: learning rate.
        weight_decay: of matrices.
        groups: other rates and decays.
    """

    fields: Mapping[str, Any]
    lr: float
    weight_decay: float
    groups: tuple[ParameterGroup, ...]


def own_optimizer(optimizer: OptimizerFactory, zero_stage: int) -> OwnOptimizer:
    """Return Megatron's equal of an optimizer.

    Args:
        optimizer: the user's.
        zero_stage: 1 for DistributedOptimizer, which has AdamW only.

    Raises:
        AdapterError: it has none.
    """
    if isinstance(optimizer, AdamW) and optimizer.fused is None:
        fields = {
            "optimizer": "adam",
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "adam_eps": optimizer.eps,
        }
        return OwnOptimizer(
            fields=fields, lr=optimizer.lr, weight_decay=optimizer.weight_decay, groups=optimizer.groups
        )
    given = type(optimizer).__name__
    if isinstance(optimizer, AdamW):
        given = f"AdamW with fused={optimizer.fused}"
    elif isinstance(optimizer, TorchOptimizer):
        settings = dict(optimizer.settings)
        known = settings.keys() & {"lr", "momentum", "weight_decay"}
        if optimizer.cls is torch.optim.SGD and known == settings.keys() and zero_stage == 0:
            return OwnOptimizer(
                fields={"optimizer": "sgd", "sgd_momentum": settings.get("momentum", 0.0)},
                lr=settings.get("lr", 1e-3),
                weight_decay=settings.get("weight_decay", 0.0),
                groups=optimizer.groups,
            )
        given = f"{optimizer.cls.__name__} with {', '.join(sorted(settings)) or 'no settings'}"
    raise AdapterError(
        f"Megatron creates its own optimizer: got {given} at zero_stage={zero_stage}, expected polyshard.AdamW(...) "
        "without fused=, or at stage 0 polyshard.TorchOptimizer(torch.optim.SGD, ...) with lr, momentum and "
        "weight_decay at most. Its own Muon needs the package emerging-optimizers."
    )
