"""The learning rate of an engine: one value, which each parameter group scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyshard.core.errors import ConfigurationError
from polyshard.core.optimizer import check_setting
from polyshard.core.parameter_groups import LR_SCALE
from polyshard.training.schedule import Schedule, SchedulerFactory


def set_scales(optimizer: torch.optim.Optimizer) -> float:
    """Give each group `lr_scale`, the ratio of its learning rate to the optimizer's, and return the latter.

    Of an optimizer whose groups have no scales, which a function of the user made, it is the first group's.

    Raises:
        ConfigurationError: the first group's rate is 0, and another's is not.
    """
    groups = optimizer.param_groups
    if all(LR_SCALE in group for group in groups):
        return float(optimizer.defaults["lr"])
    first = float(groups[0].get("lr", 0.0))
    for group in groups:
        rate = float(group.get("lr", 0.0))
        if not first and rate:
            raise ConfigurationError(
                f"the optimizer's first parameter group has no learning rate: got 0 and {rate}, expected a positive "
                "rate, to which the others keep their ratio."
            )
        group[LR_SCALE] = rate / first if first else 1.0
    return first


class LearningRate:
    """The rate of the next update, in all groups of an optimizer.

    Args:
        optimizer: the library's, whose groups have `lr_scale`.
        lr: of a group with scale 1.
        scheduler: makes the scheduler that sets the rate; None for a constant one.
    """

    def __init__(self, optimizer: Any, lr: float, scheduler: SchedulerFactory | None) -> None:
        self._optimizer = optimizer
        self._lr = lr
        self.schedule = None if scheduler is None else Schedule(scheduler, lr)
        self._write()

    @property
    def lr(self) -> float:
        """The rate of the next update in a group with scale 1."""
        return self._lr if self.schedule is None else self.schedule.lr

    def set(self, lr: float) -> None:
        """Set the rate.

        Raises:
            ConfigurationError: a scheduler sets it, or it is negative or no number.
        """
        check_setting("the learning rate", lr)
        if self.schedule is not None:
            raise ConfigurationError(
                "the engine's scheduler sets the learning rate: got another rate, expected none. Build the engine "
                "without scheduler= to set it yourself."
            )
        self._lr = lr
        self._write()

    def updated(self) -> None:
        """Advance the schedule, after an update of the weights."""
        if self.schedule is not None:
            self.schedule.step()
            self._write()

    def load(self, lr: float, schedule: Mapping[str, Any] | None) -> None:
        """Continue with a saved rate, or with a saved state of the schedule."""
        if schedule is not None:
            assert self.schedule is not None, "checked before anything was loaded"
            self.schedule.load(schedule)
        elif self.schedule is None:
            self._lr = lr
        self._write()

    def _write(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * group[LR_SCALE]
