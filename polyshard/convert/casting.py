"""Casts of weights to another dtype that report every loss of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from polyshard.convert.format import Foreign
from polyshard.core.errors import CheckpointError
from polyshard.experts.observed import is_stored_router_bias
from polyshard.weights.lazy_tensor import LazyTensor

# Relative error that a value, or a row of a matrix, may have: the spacing of bfloat16, the coarsest dtype of weights.
PRECISION = 2.0**-8


@dataclass(slots=True)
class Casts:
    """Counts of the values that casting has rounded to zero or to subnormals, and of the tensors that keep their dtype.

    The correction biases of routers keep it: rounding them would let tokens choose other experts, and transformers and
    vLLM compute with them in float32.
    """

    dtype: torch.dtype
    kept: int = 0
    underflows: int = 0
    subnormals: int = 0
    where: set[str] = field(default_factory=set)

    def notes(self) -> tuple[str, ...]:
        """Return the counts as notes for the user."""
        kept: tuple[str, ...] = (f"kept the dtype of {self.kept} correction biases of routers",) if self.kept else ()
        if not self.where:
            return kept
        return (
            *kept,
            f"{self.underflows} values became zero and {self.subnormals} subnormal in {_short(self.dtype)}, in "
            f"{len(self.where)} tensors such as {min(self.where)}",
        )


def cast(foreign: Foreign, dtype: torch.dtype) -> tuple[Foreign, Casts]:
    """Return the checkpoint with its floating-point tensors cast to a dtype. Casts are checked when tensors are loaded.

    Correction biases of routers keep their dtype.

    Args:
        foreign: the checkpoint.
        dtype: a floating-point dtype.
    """
    kept = {name for name, tensor in foreign.tensors.items() if is_stored_router_bias(name) and tensor.dtype != dtype}
    casts = Casts(dtype, kept=len(kept))
    tensors = {
        name: replace(tensor, dtype=dtype, load=_loader(name, tensor, casts), read_region=None)
        if _floating(tensor) and name not in kept
        else tensor
        for name, tensor in foreign.tensors.items()
    }
    return replace(foreign, tensors=tensors), casts


def checked_cast(name: str, values: torch.Tensor, casts: Casts) -> torch.Tensor:
    """Cast one tensor.

    Raises:
        CheckpointError: a finite value overflows; an element of a vector, or a row of a matrix as a whole, becomes
            subnormal and loses more than bfloat16 would; or the whole tensor becomes zero.

    Examples:
        >>> checked_cast("a.weight", torch.tensor([1.0, 2.0]), Casts(torch.bfloat16))
        tensor([1., 2.], dtype=torch.bfloat16)
    """
    dtype = casts.dtype
    result = values.to(dtype)
    overflow = values.isfinite() & ~result.isfinite()
    if overflow.any():
        worst = values[overflow].abs().max().item()
        raise CheckpointError(
            f"{name} overflows in {_short(dtype)}: got {worst:.6g}, expected at most {torch.finfo(dtype).max:.6g}. "
            f"{_advice(values.dtype)}"
        )
    small = (values != 0) & (result.abs() < torch.finfo(dtype).smallest_normal)
    if not small.any() or torch.equal(result[small].double(), values[small].double()):
        return result
    _check_rows(name, values, result, dtype)
    casts.where.add(name)
    casts.underflows += int((small & (result == 0)).sum())
    casts.subnormals += int((small & (result != 0)).sum())
    return result


def _check_rows(name: str, values: torch.Tensor, result: torch.Tensor, dtype: torch.dtype) -> None:
    """Check each element of a vector and each row of a matrix; small values in a row of larger ones may be rounded."""
    before, after = (t.double().reshape(-1, t.shape[-1] if t.dim() > 1 else 1) for t in (values, result))
    vanished = (after == 0).all(dim=1)  # negligible beside the other rows, so reported only
    wrong = ((after - before).norm(dim=1) > PRECISION * before.norm(dim=1)) & ~vanished
    if vanished.all():
        raise CheckpointError(
            f"{name} becomes zero in {_short(dtype)}: got values up to {values.abs().max().item():.3g}, expected at "
            f"least {torch.finfo(dtype).smallest_normal:.3g}. {_advice(values.dtype)}"
        )
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{name} becomes subnormal in {_short(dtype)}: got values up to {before[row].abs().max().item():.3g} in "
            f"row {row}, expected at least {torch.finfo(dtype).smallest_normal:.3g}. {_advice(values.dtype)}"
        )


def _loader(name: str, tensor: LazyTensor, casts: Casts) -> Callable[[], torch.Tensor]:
    return lambda: checked_cast(name, tensor.load(), casts)


def _floating(tensor: LazyTensor) -> bool:
    return tensor.dtype.is_floating_point


def _advice(dtype: torch.dtype) -> str:
    kept = "bfloat16" if dtype != torch.float64 else "float32 or bfloat16"
    return f"Use --dtype {kept}, which has the range, or omit --dtype."


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
