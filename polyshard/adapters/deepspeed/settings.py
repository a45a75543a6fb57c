"""DeepSpeed's configuration: what it must not contain, and what offload adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyshard.core.errors import ConfigurationError


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse fields of the user's configuration that would change the training without a trace.

    Raises:
        ConfigurationError: gradient accumulation, an optimizer or a scheduler.
    """
    if config.get("gradient_accumulation_steps", 1) != 1:
        raise ConfigurationError(
            "config['gradient_accumulation_steps'] must be 1: DeepSpeed would divide every loss by it. Accumulate "
            "with train_batch(micro_batches), or around micro-batches with accumulate()"
        )
    for field in ("optimizer", "scheduler"):
        if field in config:
            raise ConfigurationError(
                f"config sets the {field}: got {config[field]!r}, which no training state would hold. Pass {field}= to "
                "the engine instead."
            )


def with_offload(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return settings with ZeRO-Offload of the optimizer to the CPU, which torch's optimizer updates."""
    offload = {"device": "cpu", "pin_memory": device.type != "cpu"}
    return {
        **settings,
        "zero_optimization": {**settings["zero_optimization"], "offload_optimizer": offload},
        "zero_force_ds_cpu_optimizer": False,  # its own would be compiled first, which takes minutes
    }
