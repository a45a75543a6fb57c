"""The weights of the full model over all pipeline stages: their table, and which rank stores each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.weight_table import WeightEntry, WeightTable

STAGE_OF_PARAMETER = "stage_of_parameter"  # attribute of a module with several stages: name -> stage number


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """The weights of all pipeline stages, as this rank sees them. Names are those of the full model.

    Attributes:
        table: the entries of all stages, in the order of the stages.
        dtypes: the dtype of each parameter.
        owned: the names of this rank's parameters that it stores: those that no earlier stage holds.
        holders: the pipeline ranks of each weight that several ranks hold (a tied embedding); the first one owns it.
        owners: the pipeline rank that owns each weight.
        frozen_ranks: the pipeline ranks that hold no weight with a gradient.
    """

    table: WeightTable
    dtypes: Mapping[str, torch.dtype]
    owned: frozenset[str]
    holders: Mapping[str, tuple[int, ...]]
    owners: Mapping[str, int]
    frozen_ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, table: WeightTable, context: ParallelContext) -> ModelWeights:
        """Return the weights of the model of which `module` is this rank's part. A collective over the pipeline axis.

        Args:
            module: this rank's stage or stages.
            table: its weight table.
            context: the parallel context.

        Raises:
            ConfigurationError: a weight that several stages hold is frozen on some of them only.
        """
        axis = context.axis("pipeline")
        parameters = dict(module.named_parameters())
        dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        if axis.size == 1:
            owners = dict.fromkeys(table, 0)
            return cls(table=table, dtypes=dtypes, owned=frozenset(table), holders={}, owners=owners)
        stage_of: Mapping[str, int] = getattr(module, STAGE_OF_PARAMETER, {})
        mine = [
            (stage_of.get(name, axis.rank), index, entry, dtypes[name], parameters[name].requires_grad)
            for index, (name, entry) in enumerate(table.items())
        ]
        with context.guard("pipeline exchange"):
            gathered = gather_over(axis, mine)
        return cls._merge(gathered, axis.rank)

    @classmethod
    def _merge(cls, gathered: list[list[tuple[int, int, WeightEntry, torch.dtype, bool]]], rank: int) -> ModelWeights:
        flat = [(*item, holder) for holder, part in enumerate(gathered) for item in part]
        flat.sort(key=lambda item: (item[0], item[1], item[5]))
        entries: dict[str, WeightEntry] = {}
        dtypes: dict[str, torch.dtype] = {}
        held: dict[str, list[int]] = {}
        trained: dict[str, bool] = {}
        for _, _, entry, dtype, trains, holder in flat:
            if trained.setdefault(entry.parameter, trains) != trains:
                raise ConfigurationError(
                    f"{entry.parameter} is held by several pipeline stages, and frozen on some of them only. Set "
                    "requires_grad alike on all stages."
                )
            name = entry.parameter
            before = entries.get(name)
            entries[name] = entry if before is None else _joined(before, entry)
            dtypes.setdefault(name, dtype)
            if holder not in held.setdefault(name, []):
                held[name].append(holder)
        return cls(
            table=WeightTable(entries),
            dtypes=dtypes,
            owned=frozenset(name for name, ranks in held.items() if ranks[0] == rank),
            holders={name: tuple(ranks) for name, ranks in held.items() if len(ranks) > 1},
            owners={name: ranks[0] for name, ranks in held.items()},
            frozen_ranks=tuple(at for at, part in enumerate(gathered) if not any(trains for *_, trains in part)),
        )


def _joined(first: WeightEntry, second: WeightEntry) -> WeightEntry:
    """Return the entry of a weight that two stages hold: it has the tied names of both."""
    return replace(
        first,
        tied_names=tuple(dict.fromkeys((*first.tied_names, *second.tied_names))),
        tied_parameters=tuple(dict.fromkeys((*first.tied_parameters, *second.tied_parameters))),
    )


def gather_over(axis: ParallelAxis, value: Any) -> list[Any]:
    """Return the values of all ranks of an axis, in its order. A collective over the axis."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values
