"""DeepSpeed's configuration: what it must not contain, and what precision and offload add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyshard.adapters.deepspeed.adapter import CAPABILITIES
from polyshard.core.errors import ConfigurationError
from polyshard.core.precision import Precision


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


def autocast_settings(precision: Precision) -> dict[str, Any]:
    """Return the settings of DeepSpeed's autocast, if parameters are cast for computation."""
    if not precision.casts:
        return {}
    return {"torch_autocast": {"enabled": True, "dtype": str(precision.compute_dtype).removeprefix("torch.")}}


def check_precision(precision: Precision, stage: int, config: dict[str, Any]) -> None:
    """Raise `ConfigurationError` for what DeepSpeed 0.19 lacks, or gets wrong."""
    if config.keys() & {"bf16", "fp16", "torch_autocast"}:
        # Stage 0 with "bf16" steps once while it is built, and keeps its masters where no checkpoint finds them.
        raise ConfigurationError(
            f"config sets the precision: got {', '.join(sorted(config.keys() & {'bf16', 'fp16', 'torch_autocast'}))}. "
            "Pass precision=polyshard.Precision(...) instead."
        )
    if precision.float8 is not None:
        CAPABILITIES.require("float8")
    if precision.scales_loss:
        raise ConfigurationError(
            "float16 is unsupported with DeepSpeed: its loss scaling does not run on CPU and has not been tested. "
            "Compute in bfloat16."
        )
    if precision.parameters == torch.bfloat16 and (stage == 0 or not precision.has_masters):
        raise ConfigurationError(
            f"DeepSpeed's ZeRO stage {stage} keeps no masters of bfloat16 parameters: got {precision}. Use stages 1 to "
            "3 with optimizer=torch.float32, or build the model in float32 and pass "
            "precision=Precision(compute=torch.bfloat16)."
        )
    if precision.reduce != torch.float32:
        raise ConfigurationError(
            f"DeepSpeed's engine reduces gradients in float32 here: got reduce={precision.reduce}, expected "
            "torch.float32."
        )
