"""Native RMS norm for CPUs, computed in float32 and rounded once."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from polyshard.native.build import KINDS, NUMBER, POINTER, SIZE, function, rows_of, supports_tensor, unavailable_reason
from polyshard.native.custom_operator import bare_operator

SOURCE = Path(__file__).with_name("norm.cpp")


def supports(x: torch.Tensor) -> bool:
    """Return whether `rms_norm` supports a tensor like `x` on this machine. The first call may compile."""
    return supports_tensor(x) and _available()


@torch.compiler.assume_constant_result  # Dynamo must not trace the build; before 2.12 it does not support Path
def _available() -> bool:
    return unavailable_reason(SOURCE) is None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Compute `x / sqrt(mean(x²) + eps) · weight` over the last dimension; `weight` is `[size]` in the dtype of `x`.

    The bits of a row depend only on that row. Not differentiable.
    """
    return (_operator if torch.compiler.is_compiling() else _rms_norm)(x, weight, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    size = x.shape[-1]
    assert (weight.dtype, weight.shape) == (x.dtype, (size,)), (weight.dtype, weight.shape, x.dtype, x.shape)
    weight = weight.contiguous()
    rows, stride = rows_of(x)
    out = x.new_empty(x.shape)
    pointers = rows.data_ptr(), stride, weight.data_ptr(), out.data_ptr()
    _function()(KINDS[x.dtype], *pointers, rows.shape[0], size, eps, torch.get_num_threads())
    return out


def rms_norm_backward(
    x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `x`, in its dtype, and of `weight`, in float32, from that of the result."""
    size = x.shape[-1]
    weight = weight.contiguous()
    (rows, stride), (gradients, step) = rows_of(x), rows_of(gradient.to(x.dtype))
    to_x, to_weight = x.new_empty(x.shape), torch.empty(size, dtype=torch.float32)
    given = rows.data_ptr(), stride, weight.data_ptr(), gradients.data_ptr(), step
    places = to_x.data_ptr(), to_weight.data_ptr()
    _backward()(KINDS[x.dtype], *given, *places, rows.shape[0], size, eps, torch.get_num_threads())
    return to_x, to_weight


# Also used under torch.compile, whose generated loops are slower.
_operator = bare_operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, lambda x, weight, eps: x.new_empty(x.shape)
)


@functools.cache
def _function() -> Any:
    return function(
        SOURCE, "polyshard_norm", NUMBER, POINTER, SIZE, POINTER, POINTER, SIZE, SIZE, ctypes.c_float, NUMBER
    )


@functools.cache
def _backward() -> Any:
    given, places = (POINTER, SIZE, POINTER, POINTER, SIZE), (POINTER, POINTER)
    sizes = SIZE, SIZE, ctypes.c_float
    return function(SOURCE, "polyshard_norm_backward", NUMBER, *given, *places, *sizes, NUMBER)
