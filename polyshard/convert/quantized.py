"""Quantized weights: recognized, so that codes are never taken for weights."""

from __future__ import annotations

import re

import torch

from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import Foreign

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KIN = re.compile(
    r"(\.(weight_scale|weight_scale_inv|weight_zero_point|weight_packed|weight_shape|input_scale|qweight|qzeros|scales|"
    r"g_idx|SCB|absmax|quant_map|nested_absmax|nested_quant_map)|\.quant_state\..+|_(blocks|scales))$"
)


def signs_of_quantization(foreign: Foreign) -> list[str]:
    """What says that a checkpoint's tensors are codes: the configuration, names, dtypes."""
    signs: list[str] = []
    stated = (foreign.config or {}).get("quantization_config")
    if stated:
        signs.append(f"quantization_config with quant_method={stated.get('quant_method')!r}")
    for name, tensor in foreign.tensors.items():
        if _KIN.search(name) or (len(tensor.shape) > 1 and tensor.dtype not in FLOATS):
            signs.append(f"{name} in {str(tensor.dtype).removeprefix('torch.')}")
    return signs


def refuse_codes(foreign: Foreign, where: object) -> None:
    """Raise where tensors are codes that would be written as weights.

    Raises:
        CheckpointError: the checkpoint is quantized.
    """
    signs = signs_of_quantization(foreign)
    if signs:
        more = f" and {len(signs) - 3} more" if len(signs) > 3 else ""
        raise CheckpointError(
            f"{where} holds quantized weights: got {', '.join(signs[:3])}{more}, expected floating-point ones. Pass "
            "--dtype "
            "to dequantize FP8, compressed-tensors' int8 and float8, and MXFP4; dequantize others with the library "
            "that "
            "wrote them. Between Hugging Face directories all are copied as they are without --dtype."
        )
