"""The packed native matmul for CPUs: `x Wᵀ + b`, in which the bits of a row depend only on that row and the weight."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from polyshard.native.build import KINDS, NUMBER, POINTER, SIZE, function, library, rows_of, unavailable_reason
from polyshard.native.custom_operator import bare_operator

SOURCE = Path(__file__).with_name("matmul.cpp")


def unsupported_reason(dtype: torch.dtype) -> str | None:
    """Return why a weight of this dtype cannot be packed on this machine; None if it can. The first call may compile.

    Examples:
        >>> unsupported_reason(torch.int8)
        'supports float32, bfloat16, float16, not torch.int8'
    """
    if dtype not in KINDS:
        return f"supports {', '.join(str(d).removeprefix('torch.') for d in KINDS)}, not {dtype}"
    return unavailable_reason(SOURCE)


class PackedProduct:
    """`x Wᵀ + b` with a packed copy of the weight.

    The bits of an output depend only on its row of `x` and its row of the weight, and not on the number or content of
    other rows, the sharding of the weight's rows, or the number of threads. Sums are in float32.

    Args:
        weight: nonempty `[out, in]` on CPU, of a dtype for which `unsupported_reason` returns None.
        gated: whether the first half of its rows are the gates of the second, as in `swiglu`.

    Attributes:
        packed: the copy, `[panels, terms, columns, inputs of a term]`.
    """

    def __init__(self, weight: torch.Tensor, gated: bool = False) -> None:
        assert unsupported_reason(weight.dtype) is None
        weight, stride = rows_of(weight.detach())
        self.out_features, self.in_features = weight.shape
        assert weight.numel(), weight.shape
        assert not (gated and self.out_features % 2), weight.shape
        self._half = self.out_features // 2 if gated else 0
        columns, term = _panel_columns(), _inputs_of_a_term(weight.dtype)
        panels = -(-2 * self._half // columns) if gated else -(-self.out_features // columns)
        terms = -(-self.in_features // term)
        self.packed = torch.empty(panels, terms, columns, term, dtype=weight.dtype)
        pack = function(SOURCE, "polyshard_pack", NUMBER, POINTER, SIZE, POINTER, SIZE, SIZE, SIZE, NUMBER)
        sizes = self.in_features, self.out_features, self._half
        pointers = weight.data_ptr(), stride, self.packed.data_ptr()
        pack(KINDS[weight.dtype], *pointers, *sizes, torch.get_num_threads())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply `[..., in]` to `[..., out]`; `bias` is `[out]`. Not differentiable."""
        return self._multiply(x, bias, None, False)

    def swiglu(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map `[..., in]` to `[..., out / 2]`, equal bit for bit to `polyshard.native.swiglu` of the matmul."""
        assert self._half, "packed without gates"
        return self._multiply(x, bias, None, True)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Add the matmul of `x` `[..., in]` to `residual` `[..., out]`, equal bit for bit to torch's addition."""
        assert residual.shape == (*x.shape[:-1], self.out_features), (residual.shape, x.shape, self.out_features)
        return self._multiply(x, bias, residual, False)

    def _multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool
    ) -> torch.Tensor:
        assert x.shape[-1] == self.in_features, (x.shape, self.in_features)
        multiply = _operator if torch.compiler.is_compiling() else _multiply
        return multiply(x, self.packed, bias, residual, self.out_features, self._half, gated)


def _multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_features: int,
    half: int,
    gated: bool,
) -> torch.Tensor:
    dtype = packed.dtype
    assert x.dtype == dtype, (x.dtype, dtype)
    assert bias is None or (bias.dtype == dtype and bias.is_contiguous())
    rows, stride = rows_of(x)
    out = _outputs(x, out_features, half, gated)
    added, added_stride = (None, 0) if residual is None else rows_of(residual)
    pointers = rows.data_ptr(), stride, packed.data_ptr(), None if bias is None else bias.data_ptr()
    sums = None if added is None else added.data_ptr(), added_stride, out.data_ptr()
    sizes = rows.shape[0], x.shape[-1], out_features, half
    _product()(KINDS[dtype], *pointers, *sums, *sizes, gated, torch.get_num_threads())
    return out


def _outputs(x: torch.Tensor, out_features: int, half: int, gated: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], half if gated else out_features))


_operator = bare_operator(
    "packed_product(Tensor x, Tensor packed, Tensor? bias, Tensor? residual, int out_features, int half, bool gated)"
    " -> Tensor",
    _multiply,
    lambda x, packed, bias, residual, *sizes: _outputs(x, *sizes),
)


@functools.cache
def _product() -> Any:
    pointers = (POINTER, SIZE, POINTER, POINTER, POINTER, SIZE, POINTER)
    arguments = (NUMBER, *pointers, SIZE, SIZE, SIZE, SIZE, NUMBER, NUMBER)
    return function(SOURCE, "polyshard_product", *arguments)


@functools.cache
def _panel_columns() -> int:
    return library(SOURCE).polyshard_panel_columns()


@functools.cache
def _inputs_of_a_term(dtype: torch.dtype) -> int:
    """Return 2 if the processor multiplies pairs of this dtype, otherwise 1."""
    return library(SOURCE).polyshard_term_inputs(KINDS[dtype])
