"""The parameters of experts, which are distributed over the expert axis."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from polyshard.core.weight_table import collect_layouts


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that are distributed over the expert axis."""
    parameters = dict(model.named_parameters())
    for name, entry in collect_layouts(model).items():
        if entry.layout.experts is not None:
            yield parameters[name]
