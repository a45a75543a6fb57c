"""One matrix product for each group of neighbouring rows (grouped GEMM)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_matmul(rows: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        rows: `[rows, in]`, sorted by group.
        weight: `[groups, in, out]`.
        counts: int64 `[groups]`, the number of rows of each group; may be 0.

    Returns:
        `[rows, out]`.
    """
    if rows.device.type == "meta":
        return _OnMeta.apply(rows, weight)
    if rows.dtype not in _DTYPES or rows.dtype != weight.dtype or not _is_aligned(rows, weight):
        # `unbind`, since indexing gives each group a gradient of the whole bank: 5 to 30 times slower at 64 experts.
        parts = zip(rows.split(counts.tolist()), weight.unbind(0))
        return torch.cat([part @ matrix for part, matrix in parts])
    ends = counts.cumsum(0).to(torch.int32)
    return _ContiguousGradient.apply(F.grouped_mm(rows, weight, offs=ends))


def _is_aligned(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether rows of both begin at multiples of 16 bytes, which torch's grouped_mm requires."""
    sizes = (rows.shape[-1], *weight.shape[-2:])
    return all(size * rows.element_size() % 16 == 0 for size in sizes)


class _ContiguousGradient(torch.autograd.Function):
    """The identity; grouped_mm's backward rejects expanded gradients ("Invalid strides/sizes", torch 2.13)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].contiguous()


class _OnMeta(torch.autograd.Function):
    """The shapes and FLOPs of a product in groups, for a plan: one product of all rows has as many as those of groups.

    torch's grouped_mm supports only bfloat16 on the meta device (2.13), and its FLOP counter does not know it.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return rows @ weight[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, weight = ctx.saved_tensors
        _ = rows.t() @ gradients[0]  # as many FLOPs as the weight's gradient
        return gradients[0] @ weight[0].t(), torch.empty_like(weight)
