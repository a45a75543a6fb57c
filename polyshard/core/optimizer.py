"""Optimizers as data: AdamW, which every library has, and any optimizer of torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError
from polyshard.core.parameter_groups import NamedParameters, ParameterGroup, build_optimizer

# The engine calls the factory after it has wrapped the model, because FSDP and ZeRO replace the parameters. Names are
# those of the model as written, without the modules that a library puts in between.
OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """The settings of AdamW. Calling it builds torch's optimizer; a library with its own AdamW reads the fields.

    Weight decay is not applied to vectors (norms and biases), unless a group says so. Parameters with
    `requires_grad=False` are left out.

    Attributes:
        lr: learning rate.
        betas: decay rates of both moments.
        eps: added to the denominator.
        weight_decay: of matrices.
        groups: other rates and decays by parameter name. The first group that matches counts. Engines check that each
            pattern matches a parameter.
        fused: use torch's fused kernel; None for wherever torch has one for the device.

    Raises:
        ConfigurationError: a setting is out of its range.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

    Examples:
        >>> optimizer = AdamW(lr=1e-3)(torch.nn.Linear(4, 4).named_parameters())
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    groups: tuple[ParameterGroup, ...] = ()
    fused: bool | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_setting(f"AdamW.{name}", getattr(self, name))
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise ConfigurationError(f"AdamW.betas is invalid: got {self.betas!r}, expected a pair of numbers.")
        for beta in self.betas:
            check_setting("AdamW.betas", beta, below=1.0)

    def __call__(self, named_parameters: NamedParameters) -> torch.optim.Optimizer:
        """Return torch's AdamW for the parameters that require a gradient."""
        settings = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        named = list(named_parameters)
        if self.fused is not None:
            return build_optimizer(torch.optim.AdamW, named, self.groups, {**settings, "fused": self.fused})
        try:
            return build_optimizer(torch.optim.AdamW, named, self.groups, {**settings, "fused": True})
        except RuntimeError:  # torch has no fused kernel for this device or dtype
            return build_optimizer(torch.optim.AdamW, named, self.groups, settings)


def check_setting(name: str, value: Any, below: float = math.inf) -> None:
    """Check a number of an optimizer, which not every library does.

    Raises:
        ConfigurationError: it is not a number from 0 to below `below`.

    Examples:
        >>> check_setting("AdamW.lr", 1e-3)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < below:
        limit = "" if below == math.inf else f" below {below:g}"
        raise ConfigurationError(f"{name} is invalid: got {value!r}, expected a finite number{limit} of 0 or more.")


@dataclass(frozen=True, slots=True, init=False)
class TorchOptimizer:
    """An optimizer of torch, or another subclass of `torch.optim.Optimizer`, with its settings.

    It must compute each element by itself, since engines shard parameters: torch's Adafactor and LBFGS do not, and
    Muon does not (see `polyshard.Muon`). Weight decay is not applied to vectors, unless a group says so, and parameters
    with `requires_grad=False` are left out. Megatron-Core has SGD and AdamW only.

    Attributes:
        cls: the class.
        settings: its arguments.
        groups: other rates and decays by parameter name; see `AdamW`.

    Raises:
        ConfigurationError: the optimizer has no learning rate, or rejects a setting when it is built.

    Examples:
        >>> sgd = TorchOptimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> sgd(torch.nn.Linear(4, 4).named_parameters()).param_groups[0]["momentum"]
        0.9
    """

    cls: type[torch.optim.Optimizer]
    settings: Mapping[str, Any]
    groups: tuple[ParameterGroup, ...]

    def __init__(
        self, cls: type[torch.optim.Optimizer], /, *, groups: tuple[ParameterGroup, ...] = (), **settings: Any
    ) -> None:
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise ConfigurationError(
                f"TorchOptimizer takes a class: got {cls!r}, expected a subclass of torch.optim.Optimizer."
            )
        object.__setattr__(self, "cls", cls)
        object.__setattr__(self, "settings", dict(settings))
        object.__setattr__(self, "groups", groups)

    def __call__(self, named_parameters: NamedParameters) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters that require a gradient."""
        try:
            return build_optimizer(self.cls, named_parameters, self.groups, self.settings)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigurationError):
                raise
            if self.cls is not getattr(torch.optim, "Muon", None):
                raise ConfigurationError(
                    f"{self.cls.__name__} rejects its settings: got {dict(self.settings)}: {error}"
                ) from error
            raise ConfigurationError(
                f"torch.optim.Muon rejects the model or its settings: {error}. Use polyshard.Muon, which updates "
                "vectors by AdamW."
            ) from error
