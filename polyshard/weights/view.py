"""A model's weights, whether a training engine holds them or the bare module: the same questions of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.pieces import MASTER, Piece
from polyshard.core.weight_table import WeightTable, collect_layouts
from polyshard.weights.movement import module_pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightView:
    """Weights of one model in this process.

    Attributes:
        module: the model as its factory built it.
        table: the layouts of its parameters.
        pieces: `() -> this rank's runs of elements of all parameters`, without communication.
        shards: `() -> name and tensor-parallel shard of each parameter`, full over the data axis. A collective.
        has_masters: whether an optimizer keeps wider copies of parameters.
        masters: `() -> this rank's runs of the optimizer's wider copies of parameters`; empty without masters.
        masters_written: called after values were written into pieces of `masters()`.
        changes: `() -> a count that grows with each change of the weights`.
        written: called after values were written into pieces of `pieces()`. A collective.
    """

    module: nn.Module
    table: WeightTable
    pieces: Callable[[], Iterable[Piece]]
    shards: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    has_masters: bool = False
    masters: Callable[[], list[Piece]]
    masters_written: Callable[[], None]
    changes: Callable[[], int]
    written: Callable[[Iterable[Piece]], None]


def view_weights(model: nn.Module | Any, parallel_context: ParallelContext) -> WeightView:
    """Return the view of a training engine's weights, or of a module's.

    Args:
        model: a model as its factory built it, or a training engine around one.
        parallel_context: the context that the model was built with.
    """
    if isinstance(model, nn.Module):
        return _module_view(model, parallel_context)
    return WeightView(
        module=model.module,
        table=model.table,
        pieces=model.weight_pieces,
        shards=model.weights,
        has_masters=model.precision.has_masters,
        masters=lambda: _masters(model),
        masters_written=lambda: _masters_written(model),
        changes=lambda: model.updates,
        written=lambda _: model.weights_written(),
    )


def parameter_changes(module: nn.Module) -> Callable[[], int]:
    """Return a function that counts in-place changes of a module's parameters."""
    parameters = list(module.parameters())
    return lambda: sum(parameter._version for parameter in parameters)


def _module_view(module: nn.Module, parallel_context: ParallelContext) -> WeightView:
    return WeightView(
        module=module,
        table=collect_layouts(module),
        pieces=lambda: module_pieces(module, parallel_context),
        shards=lambda: _shards(module),
        masters=list,
        masters_written=lambda: None,
        changes=parameter_changes(module),
        written=lambda pieces: _copy_back(module, pieces),
    )


def _masters(engine: Any) -> list[Piece]:
    return [piece for piece in engine.optimizer_state().pieces if piece.slot == MASTER]


def _masters_written(engine: Any) -> None:
    engine.optimizer_written(engine.optimizer_state())


def _shards(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in module.named_parameters():
        yield name, parameter.detach()


def _copy_back(module: nn.Module, pieces: Iterable[Piece]) -> None:
    """Copy pieces into parameters that are not contiguous: theirs are copies."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for piece in pieces:
            parameter = parameters[piece.parameter]
            if piece.values.data_ptr() != parameter.data_ptr():
                parameter.copy_(piece.values.view(parameter.shape))
