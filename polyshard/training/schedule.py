"""Learning-rate schedules: any scheduler of torch, on every library's optimizer.

The optimizers of Megatron-Core and ZeRO are no torch optimizers. The scheduler is built on a stand-in with one group,
whose rate the engine multiplies by each group's `lr_scale`. So its state does not depend on how a library arranges the
parameters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from polyshard.core.errors import CheckpointError, ConfigurationError

logger = logging.getLogger(__name__)

SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


class RateOnly(torch.optim.Optimizer):
    """An optimizer with one group and nothing to update, whose learning rate a scheduler sets."""

    def __init__(self, lr: float) -> None:
        super().__init__([nn.Parameter(torch.empty(0))], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # pyrefly: ignore  # gives no loss
        """Do nothing; schedulers check that it was called."""


class Schedule:
    """A scheduler of torch and the learning rate that it sets.

    Args:
        factory: makes the scheduler from an optimizer with one group.
        lr: the optimizer's learning rate.

    Raises:
        ConfigurationError: `factory` returns no scheduler of that optimizer, or one that needs a metric.

    Examples:
        >>> schedule = Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), 0.1)
        >>> schedule.step()
        >>> schedule.lr
        0.05
    """

    def __init__(self, factory: SchedulerFactory, lr: float) -> None:
        if isinstance(factory, LRScheduler) or not callable(factory):
            raise ConfigurationError(
                f"scheduler is invalid: got {type(factory).__name__}, expected a function of an optimizer, such as "
                "lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)."
            )
        self._optimizer = RateOnly(lr)
        try:
            scheduler = factory(self._optimizer)
        except ValueError as problem:
            if "momentum" not in str(problem):
                raise
            raise ConfigurationError(
                f"scheduler sets the momentum: got {problem!r}, expected one that sets the learning rate alone. Pass "
                "cycle_momentum=False to it."
            ) from problem
        if not isinstance(scheduler, LRScheduler) or getattr(scheduler, "optimizer", None) is not self._optimizer:
            raise ConfigurationError(
                f"scheduler returns no scheduler of the optimizer that it is given: got {type(scheduler).__name__}, "
                "expected one of torch.optim.lr_scheduler."
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigurationError(
                "ReduceLROnPlateau needs a metric at each step, which an engine does not have. Call "
                "engine.set_learning_rate(...) with your metric instead."
            )
        self._scheduler = scheduler
        self._start = self._now()

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return float(self._optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Advance by one update."""
        self._optimizer.step()
        self._scheduler.step()

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON: the scheduler's class, and its values at the start and now."""
        kind = f"{type(self._scheduler).__module__}.{type(self._scheduler).__qualname__}"
        return {"kind": kind, "start": self._start, "now": self._now()}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self._scheduler.load_state_dict(_merged(self._scheduler.state_dict(), saved["now"]["scheduler"]))
        self._optimizer.param_groups[0].update(saved["now"]["group"])

    def _now(self) -> dict[str, Any]:
        group = {name: value for name, value in self._optimizer.param_groups[0].items() if name != "params"}
        return _plain({"scheduler": self._scheduler.state_dict(), "group": group})


def check_schedule(mine: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> None:
    """Check that two states, as `Schedule.state` returns them, are of schedules with the same settings.

    torch's `load_state_dict` would replace the settings of a schedule by the saved ones.

    Raises:
        CheckpointError: one of them is None, or the settings differ.

    Examples:
        >>> mine = Schedule(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), 0.1).state()
        >>> check_schedule(mine, mine)
    """
    if mine is None and saved is None:
        return
    if mine is None or saved is None:
        differing = ["none for a saved one" if mine is None else "one for none saved"]
    elif saved["kind"] != mine["kind"]:
        differing = [f"class {mine['kind']} for {saved['kind']}"]
    else:
        differing = _differences(mine["start"], saved["start"])
    if differing:
        raise CheckpointError(
            f"the learning-rate schedule is another one than the saved: got {', '.join(differing[:5])}. Build the "
            "same schedule, or pass scheduler=False to keep that of the engine, at its start."
        )


def _plain(state: Any) -> Any:
    try:
        return json.loads(json.dumps(state))
    except (TypeError, ValueError) as problem:
        raise ConfigurationError(
            f"the scheduler's state cannot be saved: {problem}, expected numbers, strings, lists and dicts."
        ) from problem


def _merged(own: Any, saved: Any) -> Any:
    """Return `saved` with the types of `own`: JSON turns tuples into lists, and integer keys into strings."""
    if _plain(own) == saved:
        return own
    if isinstance(own, dict) and isinstance(saved, dict):
        return {name: _merged(value, saved[name]) for name, value in own.items() if name in saved}
    if isinstance(own, (list, tuple)) and isinstance(saved, list) and len(own) == len(saved):
        return type(own)([_merged(mine, other) for mine, other in zip(own, saved)])
    return saved


def _differences(mine: Any, saved: Any, path: str = "") -> list[str]:
    if isinstance(mine, dict) and isinstance(saved, dict):
        names = sorted(mine.keys() | saved.keys())
        return [found for name in names for found in _differences(mine.get(name), saved.get(name), name)]
    if isinstance(mine, list) and isinstance(saved, list) and len(mine) == len(saved):
        return [found for a, b in zip(mine, saved) for found in _differences(a, b, path)]
    return [] if mine == saved else [f"{path} {mine!r} for {saved!r}"]
