"""Settings of Megatron-Core's DistributedDataParallel and precision, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from polyshard.adapters.megatron.adapter import CAPABILITIES
from polyshard.adapters.shared.options import checked_options
from polyshard.core.errors import ConfigurationError
from polyshard.core.precision import Precision


def checked_ddp_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of DistributedDataParallelConfig that users may set.

    Raises:
        ConfigurationError: another field, or one without effect.
    """
    if (options or {}).get("overlap_param_gather"):
        raise ConfigurationError(
            "overlap_param_gather is unsupported: between a step and the next forward pass Megatron's weights would be "
            "those before the step, and checkpoints and weight syncs would read them. Omit it; overlap_grad_reduce is "
            "supported."
        )
    names = {"overlap_grad_reduce", "bucket_size", "pad_buckets_for_high_nccl_busbw"}
    overlap = {"overlap_grad_reduce": False, **checked_options("ddp_options", options, names)}
    if overlap.get("bucket_size") is not None and not overlap["overlap_grad_reduce"]:
        raise ConfigurationError(
            "bucket_size has no effect: Megatron makes one bucket without overlap_grad_reduce. Pass "
            "overlap_grad_reduce=True, too."
        )
    return overlap


def check_precision(precision: Precision) -> None:
    """Raise `ConfigurationError` for what Megatron's optimizer lacks."""
    if precision.float8 is not None:
        CAPABILITIES.require("float8")
    if precision.casts:
        raise ConfigurationError(
            f"Megatron casts no parameters for computation: got compute={precision.compute_dtype} for parameters in "
            f"{precision.parameters}. Build the model in {precision.compute_dtype}: Megatron keeps float32 masters."
        )
    if precision.parameters != torch.float32 and precision.optimizer != torch.float32:
        raise ConfigurationError(
            f"Megatron's optimizer updates float32 values: got optimizer={precision.optimizer}, expected torch.float32."
        )
    if precision.reduce not in (torch.float32, precision.parameters):
        raise ConfigurationError(
            f"Megatron reduces gradients in float32 or in the dtype of the parameters: got reduce={precision.reduce}, "
            f"expected torch.float32 or {precision.parameters}."
        )


def check_loss_scale(precision: Precision, experts: Collection[str]) -> None:
    """Raise `ConfigurationError` for a scaled loss with experts that are distributed over ranks.

    Args:
        precision: of the run.
        experts: the distributed parameters.
    """
    if experts and precision.scales_loss:
        raise ConfigurationError(
            "Megatron does not support float16 with expert parallel: its optimizers of experts and of other weights "
            "have separate loss scales, which an overflow makes unequal. Use bfloat16, or an expert-parallel size of 1."
        )
