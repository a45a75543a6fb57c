"""An optimizer that keeps masters inside itself: OSS then shards, reduces and broadcasts the narrow parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from polyshard.adapters.shared.masters import refresh_masters, round_masters


class OptimizerWithMasters(torch.optim.Optimizer):
    """Another optimizer on float32 copies of its parameters.

    OSS over separate masters does not work with ShardedDataParallel, which finds each parameter's owner in OSS.

    Args:
        params: parameter groups of narrow parameters.
        inner: class of the optimizer of the masters.
        dtype: of the masters.
        settings: of that optimizer.

    Attributes:
        inner: that optimizer.
        masters: by parameter.
    """

    def __init__(self, params: Any, *, inner: type[torch.optim.Optimizer], dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(params, settings)
        self.masters: dict[torch.Tensor, nn.Parameter] = {}
        groups = []
        for group in self.param_groups:
            for parameter in group["params"]:
                narrow = parameter.dtype.itemsize < dtype.itemsize
                self.masters[parameter] = nn.Parameter(parameter.detach().to(dtype)) if narrow else parameter
            groups.append({**group, "params": [self.masters[parameter] for parameter in group["params"]]})
        build: Any = inner
        self.inner: torch.optim.Optimizer = build(groups, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyrefly: ignore  # gives no loss
        """Update the masters, and round them into the parameters."""
        assert closure is None, "a closure would need gradients of its own"
        for outer, inner in zip(self.param_groups, self.inner.param_groups):
            inner.update({name: value for name, value in outer.items() if name != "params"})
        for parameter, master in self.masters.items():
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self.inner.step()
        for parameter, master in self.masters.items():
            if master is not parameter:
                master.grad = None
        self.write_parameters()

    def write_parameters(self) -> None:
        """Round the masters into the parameters."""
        round_masters(self.masters.items())

    def read_parameters(self) -> None:
        """Set masters from parameters that no longer are their rounded values."""
        refresh_masters(self.masters.items())
