"""DeepSpeed's configuration: fields that users must not set, and those of ZeRO, precision and offload."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def zero_settings(stage: int, config: Mapping[str, Any], compiles: bool) -> dict[str, Any]:
    """Return `zero_optimization` with the stage and the user's fields, such as `overlap_comm`.

    Args:
        stage: the engine's ZeRO stage.
        config: further fields of DeepSpeed's configuration.
        compiles: whether blocks are compiled.

    Raises:
        ConfigurationError: the configuration names another stage, or stage 3 is to be compiled.

    Examples:
        >>> zero_settings(2, {"zero_optimization": {"overlap_comm": True}}, False)
        {'overlap_comm': True, 'stage': 2}
    """
    fields = config.get("zero_optimization", {})
    if fields.get("stage", stage) != stage:
        raise ConfigurationError(
            f"config['zero_optimization']['stage'] does not match zero_stage: got {fields['stage']}, expected {stage}. "
            "Pass the stage as zero_stage."
        )
    if stage == 3 and compiles:
        raise ConfigurationError(
            "compile is unsupported with ZeRO stage 3: DeepSpeed's hooks gather parameters inside of each block, and "
            "torch.compile would leave most of it uncompiled. Use stages 0 to 2, or torch's FSDP2."
        )
    return {**fields, "stage": stage}


def engine_settings(
    max_grad_norm: float | None, precision: Precision, zero: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return DeepSpeed's configuration of an engine.

    Args:
        max_grad_norm: None does not clip.
        precision: of the run.
        zero: from `zero_settings`.
        config: the user's further fields.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,  # only the unit of DeepSpeed's throughput log
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        **autocast_settings(precision),
        **config,
        "zero_optimization": zero,
    }


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


def check_experts(stage: int, experts: Collection[str]) -> None:
    """Raise `ConfigurationError` for experts that are distributed over ranks if the engine cannot train them.

    Args:
        stage: the ZeRO stage.
        experts: the distributed parameters.
    """
    if experts and stage == 3:
        raise ConfigurationError(
            "ZeRO stage 3 is unsupported with expert parallel (notimpl): DeepSpeed would shard every expert over all "
            "replicas, which hold different ones. Use stages 0 to 2, or torch's FSDP2."
        )
