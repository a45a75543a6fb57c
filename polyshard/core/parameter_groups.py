"""Parameter groups: rates and weight decay of parameters that are chosen by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError

# The key of torch's parameter groups with the ratio of a group's learning rate to that of the optimizer.
LR_SCALE = "lr_scale"

NamedParameters = Iterable[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """The learning rate and weight decay of the parameters whose name matches a pattern.

    Names are those of the model as you wrote it, without the modules that a library puts in between: they are the same
    with every library. A fused layer (`qkv`, `gate_up`) has one name, and so has a tied weight: that of its first use.

    Attributes:
        pattern: a shell pattern of parameter names, such as `"*norm*"`; `*` matches dots as well.
        lr_scale: ratio of the learning rate to the optimizer's, at every step of a schedule.
        weight_decay: None for the optimizer's, which is not applied to vectors.

    Raises:
        ConfigurationError: the pattern is no string, `lr_scale` is not positive, or `weight_decay` is negative.

    Examples:
        >>> optimizer = ps.AdamW(lr=1e-3, groups=(ps.ParameterGroup("embed*", lr_scale=0.1, weight_decay=0.0),))
        >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "linear": nn.Linear(2, 2, bias=False)})
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer(model.named_parameters()).param_groups]
        [(0.001, 0.1), (0.0001, 0.0)]
    """

    pattern: str
    lr_scale: float = field(default=1.0, kw_only=True)
    weight_decay: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ConfigurationError(
                f"The pattern of a ParameterGroup is invalid: got {self.pattern!r}, expected a string such as '*norm*'."
            )
        if not (self.lr_scale > 0 and math.isfinite(self.lr_scale)):
            raise ConfigurationError(
                f"The lr_scale of ParameterGroup({self.pattern!r}) is invalid: got {self.lr_scale}, expected a "
                "positive number. To freeze parameters, call requires_grad_(False) before the engine is built."
            )
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise ConfigurationError(
                f"The weight_decay of ParameterGroup({self.pattern!r}) is invalid: got {self.weight_decay}, expected 0 "
                "or more."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """What the parameters of one group have in common.

    Attributes:
        lr_scale: ratio of the learning rate to the optimizer's.
        weight_decay: of these parameters.

    Examples:
        >>> GroupSettings(lr_scale=1.0, weight_decay=0.1)
        GroupSettings(lr_scale=1.0, weight_decay=0.1)
    """

    lr_scale: float
    weight_decay: float


def group_settings(
    name: str, parameter: torch.Tensor, groups: Sequence[ParameterGroup], weight_decay: float
) -> GroupSettings:
    """Return the settings of a parameter: those of the first group that matches, else the optimizer's.

    Args:
        name: of the parameter.
        parameter: vectors are not decayed, unless a group says so.
        groups: in order.
        weight_decay: the optimizer's.

    Examples:
        >>> groups = (ParameterGroup("*norm*", lr_scale=0.5),)
        >>> group_settings("norm.weight", torch.ones(4), groups, 0.1)
        GroupSettings(lr_scale=0.5, weight_decay=0.0)
    """
    group = next((group for group in groups if fnmatchcase(name, group.pattern)), ParameterGroup("*"))
    default = weight_decay if parameter.dim() >= 2 else 0.0
    decay = default if group.weight_decay is None else group.weight_decay
    return GroupSettings(lr_scale=group.lr_scale, weight_decay=decay)


def build_optimizer(
    cls: Callable[..., torch.optim.Optimizer],
    named_parameters: NamedParameters,
    groups: Sequence[ParameterGroup],
    settings: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Return a torch optimizer of the parameters that require a gradient, in groups of equal settings.

    Args:
        cls: the class of the optimizer.
        named_parameters: by the names that patterns match.
        groups: whose patterns choose settings by name.
        settings: further arguments of `cls`.

    Raises:
        ConfigurationError: no parameter requires a gradient, or the optimizer has no learning rate, or none of the
            weight decay that a group sets.

    Examples:
        >>> named = torch.nn.Linear(2, 2).named_parameters()
        >>> optimizer = build_optimizer(torch.optim.SGD, named, (ParameterGroup("bias", lr_scale=2.0),), {"lr": 0.1})
        >>> sorted(group["lr"] for group in optimizer.param_groups)
        [0.1, 0.2]
    """
    rate, decay = (_setting(cls, name, settings) for name in ("lr", "weight_decay"))
    if rate is None or (decay is None and any(group.weight_decay is not None for group in groups)):
        missing = "learning rate" if rate is None else "weight decay"
        raise ConfigurationError(f"{getattr(cls, '__name__', cls)} has no {missing}, expected an optimizer that has.")
    chosen: dict[GroupSettings, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            chosen.setdefault(group_settings(name, parameter, groups, decay or 0.0), []).append(parameter)
    if not chosen:
        raise ConfigurationError(
            "the model has nothing to train: got no parameter that requires a gradient, expected at least one."
        )
    in_order = sorted(chosen, key=lambda found: (-found.weight_decay, -found.lr_scale))
    return cls(
        [
            {"params": chosen[found], "lr": float(rate) * found.lr_scale, LR_SCALE: found.lr_scale}
            | ({} if decay is None else {"weight_decay": found.weight_decay})
            for found in in_order
        ],
        **settings,
    )


def _setting(cls: Callable[..., Any], name: str, settings: Mapping[str, Any]) -> Any:
    """Return an argument of an optimizer's class, by default its own; None if it has none of that name."""
    declared = inspect.signature(cls).parameters.get(name)
    return settings.get(name, None if declared is None or declared.default is declared.empty else declared.default)
