"""The passes of a cross-entropy over all logits, native for CPUs, without a float32 copy of the logits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from polyshard.native.build import KINDS, NUMBER, POINTER, SIZE, function, rows_of, supports_tensor, unavailable_reason

SOURCE = Path(__file__).with_name("cross_entropy.cpp")


def supports(logits: torch.Tensor) -> bool:
    """Return whether the functions support logits like these on this machine. The first call may compile."""
    return supports_tensor(logits) and unavailable_reason(SOURCE) is None


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Return the largest logit of each row of `[rows, size]`, float32 `[rows]`; NaN is not considered."""
    out = torch.empty(len(logits), dtype=torch.float32)
    rows, stride = rows_of(logits)
    _call("polyshard_largest", logits, rows.data_ptr(), stride, out.data_ptr())
    return out


def sum_exp(logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """Return the sum of `exp(logit - top)` of each row of `[rows, size]`; `top` and the result are float32 `[rows]`."""
    out = torch.empty(len(logits), dtype=torch.float32)
    rows, stride = rows_of(logits)
    _call("polyshard_sum_exp", logits, rows.data_ptr(), stride, top.data_ptr(), out.data_ptr())
    return out


def gradient(
    logits: torch.Tensor, top: torch.Tensor, normalizer: torch.Tensor, scale: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of logits `[rows, size]`, in their dtype: `(softmax - [column is the target]) * scale`.

    Args:
        logits: as in the forward pass.
        top: float32 `[rows]`, the largest of all ranks' logits.
        normalizer: float32 `[rows]`, the sum of `exp(logit - top)` over all ranks' logits.
        scale: float32 `[rows]`, the gradient of each row's loss.
        targets: int64 `[rows]`, the target's column; -1 if it is not among these columns.
    """
    out = logits.new_empty(logits.shape)
    rows, stride = rows_of(logits)
    figures = [x.contiguous() for x in (top, normalizer, scale, targets)]
    assert [x.dtype for x in figures] == [*[torch.float32] * 3, torch.int64]
    pointers = [x.data_ptr() for x in figures]
    _call("polyshard_cross_entropy_gradient", logits, rows.data_ptr(), stride, *pointers, out.data_ptr())
    return out


def _call(name: str, logits: torch.Tensor, place: int, stride: int, *places: int) -> None:
    found = _function(name, len(places))
    found(KINDS[logits.dtype], place, stride, *places, *logits.shape, torch.get_num_threads())


@functools.cache
def _function(name: str, places: int) -> Any:
    return function(SOURCE, name, NUMBER, POINTER, SIZE, *(POINTER,) * places, SIZE, SIZE, NUMBER)
