"""Root mean square norm on CPU, computed in float32 and rounded once."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from polyshard.compiled.build import KINDS, library, unavailable

SOURCE = Path(__file__).with_name("norm.cpp")


def takes(x: torch.Tensor) -> bool:
    """Whether `rms_norm` computes a tensor like this one here. The first call may compile."""
    return x.device.type == "cpu" and x.dtype in KINDS and unavailable(SOURCE) is None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension; `weight` is `[size]` of the dtype of `x`.

    A row's bits depend on that row alone. Not differentiable.
    """
    size = x.shape[-1]
    assert (weight.dtype, weight.shape) == (x.dtype, (size,)), (weight.dtype, weight.shape, x.dtype, x.shape)
    rows = x if x.dim() == 2 else x.reshape(-1, size)
    stride, step = rows.stride()
    if step != 1:
        rows, stride = rows.contiguous(), size
    out = x.new_empty(x.shape)
    pointers = rows.data_ptr(), stride, weight.data_ptr(), out.data_ptr()
    _function()(KINDS[x.dtype], *pointers, rows.shape[0], size, eps, torch.get_num_threads())
    return out


@functools.cache
def _function() -> Any:
    found = library(SOURCE).polyshard_norm
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    found.argtypes = (number, pointer, size, pointer, pointer, size, size, ctypes.c_float, number)
    found.restype = None
    return found
