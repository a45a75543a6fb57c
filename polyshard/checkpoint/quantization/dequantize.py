"""Dequantization of weights, for formats with a public and simple rule.

Supported are FP8 in blocks or per tensor (DeepSeek-V3, Qwen3-FP8), compressed-tensors float8 (also in blocks) and int8,
and gpt-oss's MXFP4. A region needs only its own codes and the tensor's scales, so each tensor-parallel rank dequantizes
its own shard. Tests compare with the model that transformers dequantizes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyshard.checkpoint.quantization.detect import CONVERT, refuse_codes, short, signs_of_quantization
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

_CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_SCALES = (".weight_scale_inv", ".weight_scale")
ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale")
_MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_METHODS = (None, "fp8", "compressed-tensors", "mxfp4")
_OTHERS = "Dequantize it with the library that wrote it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantized:
    """A checkpoint with its quantized tensors replaced by floating-point ones.

    Attributes:
        tensors: the tensors by name; dequantized ones are float32, and scales are removed.
        config: the fields of config.json without `quantization_config`.
        notes: what was left out or changed, for the user.
    """

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def dequantized(
    tensors: Mapping[str, LazyTensor],
    config: Mapping[str, Any] | None,
    where: object,
    *,
    advice: str = CONVERT,
    known: Collection[str] = (),
) -> Dequantized:
    """Return the checkpoint with quantized tensors as float32. A tensor is read only when it is loaded.

    Args:
        tensors: the checkpoint's tensors, by name.
        config: fields of config.json, if known.
        where: the checkpoint, for errors.
        advice: what to do about unsupported quantization, for errors.
        known: names of the model's own weights, which are never treated as scales.

    Raises:
        CheckpointError: the quantization is unsupported; the message names the tensors.

    Examples:
        >>> from polyshard.convert.format import lazy
        >>> codes = {"a.weight": lazy(torch.ones(1, 2).char()), "a.weight_scale": lazy(torch.tensor([0.5]))}
        >>> dequantized(codes, None, "here").tensors["a.weight"].load()
        tensor([[0.5000, 0.5000]])
    """
    if not signs_of_quantization(tensors, config, known):
        return Dequantized(tensors=tensors, config=config)
    stated = (config or {}).get("quantization_config") or {}
    if not isinstance(stated, Mapping) or stated.get("quant_method") not in _METHODS:
        refuse_codes(tensors, config, where, advice, known)
    _refuse_other_transforms(stated, where)
    found = dict(tensors)
    count = 0
    for name, tensor in tensors.items():
        if name in known and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            continue
        if name.endswith("_blocks"):
            found[name.removesuffix("_blocks")] = _of_mxfp4(name, found.pop(name), _scale(found, name, where), where)
            count += 1
        elif name.endswith(".weight") and tensor.dtype in _CODES and len(tensor.shape) == 2:
            found[name] = _of_codes(name, tensor, _scale(found, name, where), stated, where)
            count += 1
    inputs = [name for name in found if name.endswith(ACTIVATION_SCALES) and name not in known]
    for name in inputs:
        del found[name]
    fields = {name: value for name, value in (config or {}).items() if name != "quantization_config"}
    refuse_codes(found, fields, where, advice, known)
    if not count:
        raise CheckpointError(
            f"{where} contradicts its configuration: got quantization_config with "
            f"quant_method={stated.get('quant_method')!r} and no quantized tensor, expected codes with scales. Remove "
            "quantization_config from config.json if the weights are not quantized."
        )
    notes = [f"dequantized {count} tensors"]
    if inputs:
        notes.append(f"left out {len(inputs)} activation scales, which an unquantized model does not use")
    if stated.get("activation_scheme") or any(group.get("input_activations") for group in _groups(stated)):
        notes.append("the source quantizes activations at run time; the result does not")
    return Dequantized(tensors=found, config=None if config is None else fields, notes=tuple(notes))


def _groups(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [group or {} for group in (stated.get("config_groups") or {}).values()]


def _block_sizes(stated: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of a block, each size once; compressed-tensors writes `[128, 128]`, or once wrote `128x128`."""
    found = [stated.get("weight_block_size")]
    found += [(group.get("weights") or {}).get("block_structure") for group in _groups(stated)]
    sizes = [size.split("x") if isinstance(size, str) else size for size in found if size]
    return list(dict.fromkeys((int(height), int(width)) for height, width in sizes))


def _refuse_other_transforms(stated: Mapping[str, Any], where: object) -> None:
    """Reject the rotations and sparsity of compressed-tensors, with which codes times scales are not the weight."""
    sparsity = (stated.get("sparsity_config") or {}).get("format", "dense")
    transform = stated.get("transform_config") or {}
    if sparsity != "dense" or transform:
        got = f"sparsity_config with format={sparsity!r}" if sparsity != "dense" else f"transform_config={transform!r}"
        raise CheckpointError(
            f"{where} holds quantized weights of an unsupported kind: got {got}, expected codes with scales. {_OTHERS}"
        )


def _scale(tensors: dict[str, LazyTensor], name: str, where: object) -> LazyTensor:
    stem = name.removesuffix(".weight").removesuffix("_blocks")
    for suffix in ("_scales",) if name.endswith("_blocks") else _SCALES:
        if stem + suffix in tensors:
            return tensors.pop(stem + suffix)
    raise CheckpointError(
        f"{where} holds codes without scales: got {name} in "
        f"{str(tensors[name].dtype) if name in tensors else 'blocks'}, "
        f"expected {stem}{_SCALES[0]} or a similar tensor beside it. Copy the whole checkpoint."
    )


def _of_codes(name: str, codes: LazyTensor, scale: LazyTensor, stated: Mapping[str, Any], where: object) -> LazyTensor:
    """Return `codes * scale`, with the scale expanded to the rows and columns of the weight."""
    if not scale.dtype.is_floating_point or (codes.dtype == torch.int8 and stated.get("quant_method") == "fp8"):
        raise CheckpointError(  # exponents of MXFP8, and two codes of FP4 to a byte
            f"{where}: {name} is in an unsupported format: got {short(codes.dtype)} with scales in "
            f"{short(scale.dtype)} and quant_method={stated.get('quant_method')!r}, expected float8 or "
            f"compressed-tensors' int8 with floating-point scales. {_OTHERS}"
        )
    rows, columns = codes.shape
    structures = _block_sizes(stated)
    fitting = [(h, w) for h, w in structures if tuple(scale.shape) == (-(-rows // h), -(-columns // w))]
    single = torch.Size(scale.shape).numel() == 1
    by_row = tuple(scale.shape) in ((rows, 1), (rows,))
    if not (single or by_row or len(fitting) == 1):
        raise CheckpointError(
            f"{where}: the scale of {name} has an unsupported shape: got {list(scale.shape)} for {[rows, columns]} and "
            f"blocks of {structures}, expected one scale, one for each row, or one for each block of one size. "
            f"{_OTHERS}"
        )
    blocks = fitting[0] if fitting else (1, 1)

    def region(offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        (row, column), (height, width) = offsets, sizes
        values = scale.load().float()
        if single:
            grown = values.reshape(1, 1)
        elif by_row:
            grown = values.reshape(-1, 1)[row : row + height]
        else:
            tall = torch.arange(row, row + height) // blocks[0]
            grown = values[tall][:, torch.arange(column, column + width) // blocks[1]]
        return codes.part(offsets, sizes).float() * grown

    return _lazy(codes.shape, region)


def _of_mxfp4(name: str, blocks: LazyTensor, scales: LazyTensor, where: object) -> LazyTensor:
    """Convert bytes `[experts, out, in / 32, 16]` of two codes each, low nibble first, to `[experts, in, out]`."""
    shape, exponents = tuple(blocks.shape), tuple(scales.shape)
    if len(shape) != 4 or exponents != shape[:3] or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise CheckpointError(
            f"{where}: {name} is no MXFP4: got {list(shape)} and scales {list(exponents)} in {blocks.dtype} and "
            f"{scales.dtype}, expected uint8 [experts, out, in / 32, 16] and [experts, out, in / 32]. {_OTHERS}"
        )
    experts, out, groups, half = shape
    each = 2 * half

    def region(offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        (expert, row, column), (count, width, height) = offsets, sizes  # of the result, whose rows are input channels
        first, last = row // each, -(-(row + width) // each)
        values = torch.tensor([*_MXFP4, *(-value for value in _MXFP4)])
        packed = blocks.part((expert, column, first, 0), (count, height, last - first, half))
        power = scales.part((expert, column, first), (count, height, last - first)).int() - 127
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
        full = torch.ldexp(values[codes.long()], power[..., None]).flatten(-2)
        return full[..., row - first * each : row - first * each + width].transpose(1, 2).contiguous()

    return _lazy((experts, groups * each, out), region)


def _lazy(shape: tuple[int, ...], region: Any) -> LazyTensor:
    return LazyTensor(shape, torch.float32, lambda: region((0,) * len(shape), shape), region)
