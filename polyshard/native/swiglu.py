"""Native `silu(gate) * up` for CPUs, in one pass over memory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from polyshard.native.build import KINDS, NUMBER, POINTER, SIZE, function, rows_of, supports_tensor, unavailable_reason

SOURCE = Path(__file__).with_name("swiglu.cpp")


def supports(gate_up: torch.Tensor) -> bool:
    """Return whether `swiglu` supports a tensor like this one on this machine. The first call may compile."""
    return supports_tensor(gate_up) and unavailable_reason(SOURCE) is None


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Compute `[..., 2 size]`, gate half first and up half second, to `[..., size]`. Not differentiable."""
    size = gate_up.shape[-1] // 2
    rows, stride = rows_of(gate_up)
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    kind, pointers = KINDS[gate_up.dtype], (rows.data_ptr(), stride, out.data_ptr())
    _function()(kind, *pointers, rows.shape[0], size, torch.get_num_threads())
    return out


def swiglu_backward(gate_up: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `gate_up` `[..., 2 size]`, from that of the result `[..., size]`."""
    (rows, stride), (gradients, step) = rows_of(gate_up), rows_of(gradient.to(gate_up.dtype))
    out = gate_up.new_empty(gate_up.shape)
    pointers = rows.data_ptr(), stride, gradients.data_ptr(), step, out.data_ptr()
    _backward()(KINDS[gate_up.dtype], *pointers, rows.shape[0], rows.shape[1] // 2, torch.get_num_threads())
    return out


@functools.cache
def _function() -> Any:
    return function(SOURCE, "polyshard_swiglu", NUMBER, POINTER, SIZE, POINTER, SIZE, SIZE, NUMBER)


@functools.cache
def _backward() -> Any:
    pointers = POINTER, SIZE, POINTER, SIZE, POINTER
    return function(SOURCE, "polyshard_swiglu_backward", NUMBER, *pointers, SIZE, SIZE, NUMBER)
