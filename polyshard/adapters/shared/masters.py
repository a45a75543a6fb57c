"""Masters: float32 copies of narrower parameters, which the optimizer updates and the parameters are rounded from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn


class Masters:
    """Masters of a model's trainable parameters. A parameter that is wide enough is its own master.

    Args:
        named_parameters: of the model; those that do not require a gradient have no master.
        dtype: of the masters.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
        self._held: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                narrow = parameter.dtype.itemsize < dtype.itemsize
                master = nn.Parameter(parameter.detach().to(dtype)) if narrow else parameter
                self._held[name] = (parameter, master)
        self._versions = self._current()

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._held[name][1]

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each master by the name of its parameter."""
        self._follow()
        for name, (_, master) in self._held.items():
            yield name, master

    def narrow(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the masters that are not parameters themselves."""
        self._follow()
        for name, (parameter, master) in self._held.items():
            if parameter is not master:
                yield name, master

    def write_parameters(self) -> None:
        """Round the masters into the parameters."""
        round_masters(self._held.values())
        self._versions = self._current()

    def read_parameters(self) -> None:
        """Set masters from parameters that no longer are their rounded values; others keep all their bits."""
        refresh_masters(self._held.values())
        self._versions = self._current()

    def _follow(self) -> None:
        """Take over values that a program wrote into parameters, which the next update would overwrite."""
        if self._versions != self._current():
            self.read_parameters()

    def _current(self) -> list[int]:
        """Return the number of in-place changes of each parameter that has a master, by torch's count."""
        return [parameter._version for parameter, master in self._held.values() if parameter is not master]


@torch.no_grad()
def round_masters(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Round each master into its parameter; pairs are (parameter, master)."""
    for parameter, master in pairs:
        if parameter is not master:
            parameter.copy_(master)


@torch.no_grad()
def refresh_masters(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Set masters from parameters that no longer are their rounded values; pairs are (parameter, master)."""
    for parameter, master in pairs:
        if parameter is not master:
            changed = master.to(parameter.dtype) != parameter
            master.copy_(torch.where(changed, parameter.to(master.dtype), master))


@torch.no_grad()
def broadcast_parameters(
    module: nn.Module, group: dist.ProcessGroup | None, ranks: Sequence[int], without: frozenset[str] = frozenset()
) -> None:
    """Give every replica the first one's parameters and buffers, as DistributedDataParallel does when it is built."""
    if group is None or len(ranks) == 1:
        return
    parameters = [parameter for name, parameter in module.named_parameters() if name not in without]
    for tensor in (*parameters, *module.buffers()):
        dist.broadcast(tensor, src=ranks[0], group=group)
