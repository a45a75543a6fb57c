"""The OSS of an engine: one of the weights that all replicas hold, and one of distributed experts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from polyshard.adapters.fairscale.compat import OSS
from polyshard.adapters.fairscale.masters import OptimizerWithMasters
from polyshard.core.errors import ConfigurationError
from polyshard.core.precision import Precision


class ShardedOptimizers:
    """OSS over the replicas, and another over the ranks that hold the same experts, as one optimizer.

    Args:
        template: the user's optimizer of all parameters. Both parts use its class, groups and settings.
        precision: of the run, which decides whether narrow parameters get masters.
        group: the replicas.
        experts: parameters that are distributed over the expert axis.
        expert_group: the ranks that hold the same experts; None if there are none.

    Attributes:
        dense: of the weights that all replicas hold; None if experts alone are trained.
        parts: all.

    Raises:
        ConfigurationError: the context is of another adapter, and has no group of the ranks that hold the same experts.
    """

    def __init__(
        self,
        template: torch.optim.Optimizer,
        precision: Precision,
        group: Any,
        experts: list[nn.Parameter],
        expert_group: Any,
    ) -> None:
        optimizer_class: Any = type(template)
        accepted = inspect.signature(optimizer_class).parameters  # defaults contain more than these
        settings = {name: value for name, value in template.defaults.items() if name in accepted}
        if precision.has_masters:
            settings |= {"inner": optimizer_class, "dtype": precision.optimizer}
            optimizer_class = OptimizerWithMasters
        chosen = {id(parameter) for parameter in experts}
        if chosen and expert_group is None:  # OSS would take the world
            raise ConfigurationError(
                "FairScale's engine needs process groups of experts on this context: got one of another adapter. Use "
                "polyshard.initialize('fairscale', ...)."
            )

        def sharded(distributed: bool, over: Any) -> Any:
            groups = [
                {**group, "params": [p for p in group["params"] if (id(p) in chosen) == distributed]}
                for group in template.param_groups
            ]
            groups = [found for found in groups if found["params"]]
            return OSS(groups, optim=optimizer_class, group=over, **settings) if groups else None

        self.dense: Any = sharded(False, group)
        self.parts: list[Any] = [part for part in (self.dense, sharded(True, expert_group)) if part is not None]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Update the weights, each on the rank that owns it, and send them to the others."""
        for part in self.parts:
            part.step()

    @property
    def bases(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers that hold the state of this rank."""
        inner = [part.optim for part in self.parts]
        return [found.inner if isinstance(found, OptimizerWithMasters) else found for found in inner]

    @property
    def masters(self) -> dict[torch.Tensor, nn.Parameter]:
        """The masters of this rank's narrow parameters; none without masters."""
        return {p: master for found in self._with_masters() for p, master in found.masters.items()}

    def read_parameters(self) -> None:
        """Set masters from parameters that no longer are their rounded values."""
        for found in self._with_masters():
            found.read_parameters()

    def write_parameters(self) -> None:
        """Round the masters into the parameters, on every rank."""
        for part in self.parts:
            if isinstance(part.optim, OptimizerWithMasters):
                part.optim.write_parameters()
                part._broadcast_params()

    def _with_masters(self) -> list[OptimizerWithMasters]:
        return [part.optim for part in self.parts if isinstance(part.optim, OptimizerWithMasters)]
