"""Dtypes of a training run: of stored parameters, of computation, of gradient reduction, of the optimizer's values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError

HALF = (torch.bfloat16, torch.float16)
_SUPPORTED = (torch.float64, torch.float32, *HALF)
_BESIDE_FLOAT8 = (torch.float32, torch.bfloat16)

Float8Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]  # named as in torchao


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Dtypes of a training run, for every engine.

    Two ways give bfloat16 computation with float32 values in the optimizer: parameters in float32, which are cast for
    each operation (`Precision(compute=torch.bfloat16)`), or parameters in bfloat16 with float32 masters in the
    optimizer (`Precision(parameters=torch.bfloat16)`). `polyshard.load_adapter(name).capabilities` says which of them a
    library has.

    Attributes:
        parameters: of the model's parameters as it was built.
        compute: of matrix products and attention in forward and backward; None for the dtype of the parameters.
        reduce: in which gradients are accumulated over micro-batches and summed over ranks.
        optimizer: of the values that the optimizer updates; if wider than `parameters`, it keeps masters.
        loss_scale: first factor of dynamic loss scaling, which is used if `compute` is float16.
        float8: how the inputs of the matrix products of tensor-parallel layers are scaled before they are cast to
            float8: `"tensorwise"`, `"rowwise"`, or `"rowwise_with_gw_hp"`, which computes the gradient of the weight in
            `compute`. All other operations, and the outputs of these, keep the dtype of `compute`. None for no float8.

    Raises:
        ConfigurationError: a dtype is not a float, or one is narrower than it can be used for; `float8` is unknown, or
            `compute` is neither bfloat16 nor float32 with it.

    Examples:
        >>> precision = ps.Precision(parameters=torch.bfloat16)
        >>> precision.has_masters, precision.compute_dtype
        (True, torch.bfloat16)
    """

    parameters: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    reduce: torch.dtype = torch.float32
    optimizer: torch.dtype = torch.float32
    loss_scale: float = 2.0**16
    float8: Float8Recipe | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "compute", "reduce", "optimizer"):
            dtype = getattr(self, name)
            if dtype not in _SUPPORTED and not (name == "compute" and dtype is None):
                known = ", ".join(str(known).removeprefix("torch.") for known in _SUPPORTED)
                raise ConfigurationError(f"Precision.{name} is unsupported: got {dtype}, expected one of {known}.")
        if self.compute_dtype.itemsize > self.parameters.itemsize:
            raise ConfigurationError(
                f"Precision.compute is wider than the parameters: got {self.compute} for {self.parameters}. Store the "
                "parameters in the wider dtype."
            )
        if self.optimizer.itemsize < self.parameters.itemsize:
            raise ConfigurationError(
                f"Precision.optimizer is narrower than the parameters: got {self.optimizer} for {self.parameters}. "
                "Store the parameters in the narrower dtype."
            )
        if not self.loss_scale >= 1:
            raise ConfigurationError(f"Precision.loss_scale is invalid: got {self.loss_scale}, expected at least 1.")
        if self.float8 is not None:
            self._check_float8()

    def _check_float8(self) -> None:
        if self.float8 not in get_args(Float8Recipe):
            known = ", ".join(map(repr, get_args(Float8Recipe)))
            raise ConfigurationError(
                f"Precision.float8 is invalid: got {self.float8!r}, expected None or one of {known}."
            )
        if self.compute_dtype not in _BESIDE_FLOAT8:
            raise ConfigurationError(
                f"Precision.float8 is unsupported with compute={self.compute_dtype}: expected torch.bfloat16 or "
                "torch.float32. Pass compute=torch.bfloat16."
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self.parameters if self.compute is None else self.compute

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer keeps copies of the parameters in a wider dtype."""
        return self.optimizer.itemsize > self.parameters.itemsize

    @property
    def casts(self) -> bool:
        """Whether parameters are cast for computation."""
        return self.compute_dtype != self.parameters

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that float16 gradients do not vanish."""
        return self.compute_dtype == torch.float16

    def __str__(self) -> str:
        names = {name: getattr(self, name) for name in ("parameters", "compute", "reduce", "optimizer")}
        parts = [f"{name} {str(d).removeprefix('torch.')}" for name, d in names.items() if d is not None]
        return ", ".join([*parts, f"float8 {self.float8}"] if self.float8 else parts)


def precision_of(model: nn.Module, given: Precision | None) -> Precision:
    """Return the precision of a training run; by default that of the model's parameters, with float32 in the optimizer.

    Args:
        model: as built.
        given: the user's; None for the default.

    Raises:
        ConfigurationError: the model's parameters have another dtype than `given.parameters`, or it is no `Precision`.

    Examples:
        >>> precision_of(torch.nn.Linear(2, 2).bfloat16(), None).has_masters
        True
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.requires_grad}
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    if given is None:
        wide = max(torch.float32, narrowest, key=lambda dtype: dtype.itemsize)
        return Precision(parameters=narrowest, reduce=wide, optimizer=wide)
    if not isinstance(given, Precision):
        raise ConfigurationError(
            f"precision is invalid: got {given!r}, expected a Precision, such as Precision(compute=torch.bfloat16)."
        )
    if dtypes and narrowest != given.parameters:
        raise ConfigurationError(
            f"the model's parameters have another dtype than the precision: got {narrowest}, expected "
            f"{given.parameters}. Build the model in that dtype, or call model.to({given.parameters})."
        )
    return given
