"""Quantized weights as floating-point ones, for formats with a public and simple rule; one tensor at a time.

FP8 in blocks or per tensor (DeepSeek-V3, Qwen3-FP8), compressed-tensors' float8 and int8 per tensor or channel, and
gpt-oss's MXFP4. The oracle of the tests is transformers' own dequantized model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polyshard.convert.quantized import refuse_codes, signs_of_quantization
from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import Foreign, LazyTensor

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_SCALES = (".weight_scale_inv", ".weight_scale")
_MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_METHODS = (None, "fp8", "compressed-tensors", "mxfp4")


def dequantized(foreign: Foreign, where: Path) -> Foreign:
    """The checkpoint in float32 where it was quantized, its scales and `quantization_config` taken out.

    Args:
        foreign: the checkpoint.
        where: it stands, for errors.

    Raises:
        CheckpointError: its quantization has no rule here; the tensors are named.
    """
    if not signs_of_quantization(foreign):
        return foreign
    stated = (foreign.config or {}).get("quantization_config") or {}
    if stated.get("quant_method") not in _METHODS:
        refuse_codes(foreign, where)
    tensors = dict(foreign.tensors)
    count = 0
    for name, tensor in foreign.tensors.items():
        if name.endswith("_blocks"):
            tensors[name.removesuffix("_blocks")] = _of_mxfp4(tensors.pop(name), _scale(tensors, name, where))
            count += 1
        elif name.endswith(".weight") and tensor.dtype in _CODES:
            tensors[name] = _of_codes(name, tensor, _scale(tensors, name, where), stated, where)
            count += 1
    inputs = [name for name in tensors if name.endswith(".input_scale")]
    for name in inputs:
        del tensors[name]
    config = {name: value for name, value in (foreign.config or {}).items() if name != "quantization_config"}
    notes = [f"dequantized {count} tensors"]
    if inputs:
        notes.append(f"left out {len(inputs)} scales of activations, which a model without quantization does not use")
    groups = (stated.get("config_groups") or {}).values()
    if stated.get("activation_scheme") or any((group or {}).get("input_activations") for group in groups):
        notes.append("the source quantizes activations while it computes; the target does not")
    result = replace(foreign, tensors=tensors, config=config, notes=(*foreign.notes, *notes))
    refuse_codes(result, where)
    return result


def _scale(tensors: dict[str, LazyTensor], name: str, where: Path) -> LazyTensor:
    stem = name.removesuffix(".weight").removesuffix("_blocks")
    for suffix in ("_scales",) if name.endswith("_blocks") else _SCALES:
        if stem + suffix in tensors:
            return tensors.pop(stem + suffix)
    raise CheckpointError(
        f"{where} holds codes without scales: got {name} in "
        f"{str(tensors[name].dtype) if name in tensors else 'blocks'}, "
        f"expected {stem}{_SCALES[0]} or its like beside it. Copy the whole checkpoint."
    )


def _of_codes(name: str, codes: LazyTensor, scale: LazyTensor, stated: Mapping[str, Any], where: Path) -> LazyTensor:
    """`weight * scale`, the scale grown to the weight's rows and columns."""
    rows, columns = codes.shape
    blocks = stated.get("weight_block_size") or (0, 0)
    single = torch.Size(scale.shape).numel() == 1
    by_row = tuple(scale.shape) in ((rows, 1), (rows,))
    by_block = all(blocks) and tuple(scale.shape) == (-(-rows // blocks[0]), -(-columns // blocks[1]))
    if not (single or by_row or by_block):
        raise CheckpointError(
            f"{where}: the scale of {name} has an unsupported shape: got {list(scale.shape)} for {[rows, columns]} and "
            f"blocks of {blocks}, expected one scale, one for each row, or one for each block. Dequantize it with the "
            "library that wrote it."
        )

    def grow(values: torch.Tensor) -> torch.Tensor:
        if single or by_row:
            return values.reshape(-1, 1)
        return values.repeat_interleave(blocks[0], 0)[:rows].repeat_interleave(blocks[1], 1)[:, :columns]

    return LazyTensor(codes.shape, torch.float32, lambda: codes.load().float() * grow(scale.load().float()))


def _of_mxfp4(blocks: LazyTensor, scales: LazyTensor) -> LazyTensor:
    """`[experts, out, in / 32, 16]` bytes of two codes, low first, to `[experts, in, out]`."""
    experts, out, groups, half = blocks.shape

    def load() -> torch.Tensor:
        values = torch.tensor([*_MXFP4, *(-value for value in _MXFP4)])
        packed, exponents = blocks.load(), scales.load().int() - 127
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
        full = torch.ldexp(values[codes.long()], exponents[..., None])
        return full.reshape(experts, out, groups * half * 2).transpose(1, 2).contiguous()

    return LazyTensor((experts, groups * half * 2, out), torch.float32, load)
