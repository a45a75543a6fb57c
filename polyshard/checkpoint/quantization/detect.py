"""Detection of quantized weights, so that integer codes are never loaded as weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KIN = re.compile(
    r"((\.|_)(weight_scale|weight_scale_inv|scale_inv|weight_zero_point|weight_packed|weight_shape|weight_global_scale|"
    r"input_scale|input_global_scale|qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|nested_absmax|nested_quant_map)|"
    r"\.weight_scale_\d|\.quant_state\..+|_(blocks|scales))$"
)
# The advice of loading and serving; conversion passes its own.
CONVERT = (
    "Write floating-point weights first: `polyshard convert --dtype bfloat16` does so for FP8, MXFP4 and "
    "compressed-tensors' int8 and float8; for others use the library that wrote them."
)


def signs_of_quantization(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any] | None, known: Collection[str] = ()
) -> list[str]:
    """Return the evidence that tensors are quantized: from the configuration, names and dtypes.

    Args:
        tensors: the checkpoint's tensors, by name.
        config: fields of config.json.
        known: names of the model's own weights, which are never treated as scales.

    Examples:
        >>> from polyshard.convert.format import lazy
        >>> signs_of_quantization({"up.weight": lazy(torch.ones(2, 2, dtype=torch.int8))}, None)
        ['up.weight in int8']
    """
    signs: list[str] = []
    stated = (config or {}).get("quantization_config")
    if stated:
        method = stated.get("quant_method") if isinstance(stated, Mapping) else stated
        signs.append(f"quantization_config with quant_method={method!r}")
    for name, tensor in tensors.items():
        codes = is_codes(tensor.shape, tensor.dtype)
        if codes or (_KIN.search(name) and name not in known):
            signs.append(f"{name} in {short(tensor.dtype)}")
    return signs


def is_codes(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return whether a tensor is a matrix of integers or eight-bit floats, which is never a plain weight."""
    return len(shape) > 1 and dtype not in FLOATS


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def refuse_codes(
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any] | None,
    where: object,
    advice: str = CONVERT,
    known: Collection[str] = (),
) -> None:
    """Raise an error if a checkpoint is quantized.

    Args:
        tensors: the checkpoint's tensors, by name.
        config: fields of config.json.
        where: the checkpoint, for the error.
        advice: what to do, appended to the error.
        known: as in `signs_of_quantization`.

    Raises:
        CheckpointError: the checkpoint is quantized.

    Examples:
        >>> from polyshard.convert.format import lazy
        >>> refuse_codes({"up.weight": lazy(torch.ones(2, 2))}, None, "out")
    """
    signs = signs_of_quantization(tensors, config, known)
    if signs:
        more = f" and {len(signs) - 3} more" if len(signs) > 3 else ""
        raise CheckpointError(
            f"{where} holds quantized weights: got {', '.join(signs[:3])}{more}, expected floating-point ones. {advice}"
        )
