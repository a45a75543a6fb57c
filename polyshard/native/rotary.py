"""Native rotary embedding for CPUs, in one pass over memory."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from polyshard.native.build import (
    KINDS,
    NUMBER,
    POINTER,
    SIZE,
    function,
    supports_tensor,
    unavailable_reason,
    width,
)

SOURCE = Path(__file__).with_name("rotary.cpp")


def supports(x: torch.Tensor, cos: torch.Tensor) -> bool:
    """Return whether `rotate` supports heads and cosines like these on this machine. The first call may compile."""
    if not supports_tensor(x) or cos.dtype != x.dtype or cos.shape[:-1] != (*x.shape[:-2], 1):
        return False
    lanes = width()
    return bool(lanes) and cos.shape[-1] % lanes == 0 and unavailable_reason(SOURCE) is None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """Rotate heads `[..., heads, head_dim]` by angles `[..., 1, rotary_dim / 2]`, or back if `sign` is -1.

    The bits are those of `polyshard.attention.rotary.apply_rotary`. Not differentiable.
    """
    heads, dim, half = x.shape[-2], x.shape[-1], cos.shape[-1]
    tokens = x.reshape(-1, heads, dim)
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = x.new_empty(x.shape)
    given = tokens.data_ptr(), tokens.stride(0), tokens.stride(1), cos.data_ptr(), sin.data_ptr(), out.data_ptr()
    _function()(KINDS[x.dtype], *given, len(tokens), heads, dim, half, sign, torch.get_num_threads())
    return out


@functools.cache
def _function() -> Any:
    given = POINTER, SIZE, SIZE, POINTER, POINTER, POINTER
    return function(SOURCE, "polyshard_rotate", NUMBER, *given, SIZE, SIZE, SIZE, SIZE, ctypes.c_float, NUMBER)
