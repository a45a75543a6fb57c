"""A model's weights, whether a training engine holds them or the bare module: the same questions of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.engine_copies import check_not_held
from polyshard.core.model_weights import ModelWeights
from polyshard.core.pieces import MASTER, Piece
from polyshard.core.weight_table import WeightTable, collect_layouts
from polyshard.weights.movement import module_pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightView:
    """Weights of one model in this process.

    Attributes:
        module: the model as its factory built it.
        table: the layouts of the model's parameters, on all pipeline stages.
        dtypes: the dtypes of these parameters.
        owners: the pipeline rank that stores and sends each parameter.
        owned: the parameters of this rank that it stores and sends; another stage does so for copies of a tied weight.
        pieces: `() -> this rank's runs of elements of its parameters`, without communication.
        shards: `() -> name and tensor-parallel shard of each parameter`, full over the data axis. A collective.
        has_masters: whether an optimizer keeps wider copies of parameters.
        masters: `() -> this rank's runs of the optimizer's wider copies of parameters`; empty without masters.
        masters_written: called after values were written into pieces of `masters()`.
        changes: `() -> a count that grows with each change of the weights`.
        written: called after values were written into pieces of `pieces()`. A collective.
    """

    module: nn.Module
    table: WeightTable
    dtypes: Mapping[str, torch.dtype]
    owners: Mapping[str, int]
    owned: frozenset[str]
    pieces: Callable[[], Iterable[Piece]]
    shards: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    has_masters: bool = False
    masters: Callable[[], list[Piece]]
    masters_written: Callable[[], None]
    changes: Callable[[], int]
    written: Callable[[Iterable[Piece]], None]

    def owned_pieces(self) -> list[Piece]:
        """Return this rank's runs of the parameters that it stores, without communication."""
        return [piece for piece in self.pieces() if piece.parameter in self.owned]

    @property
    def local_table(self) -> WeightTable:
        """The entries of the parameters that this rank holds."""
        held = {name for name, _ in self.module.named_parameters()}
        return WeightTable({name: entry for name, entry in self.table.items() if name in held})


def view_weights(model: nn.Module | Any, parallel_context: ParallelContext, *, written: bool = False) -> WeightView:
    """Return the view of a training engine's weights, or of a module's, a collective over the pipeline axis.

    Args:
        model: a model as its factory built it, or a training engine around one.
        parallel_context: the context that the model was built with.
        written: whether values will be written into it.

    Raises:
        ConfigurationError: it is the model of an engine that keeps the weights elsewhere.
    """
    if isinstance(model, nn.Module):
        check_not_held(model, written=written)
        return _module_view(model, parallel_context)
    weights: ModelWeights = model.model_weights  # FSDP2 may have gathered the module's parameters, in another dtype
    return WeightView(
        module=model.module,
        table=weights.table,
        dtypes=weights.dtypes,
        owners=weights.owners,
        owned=weights.owned,
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
    weights = ModelWeights.of(module, collect_layouts(module), parallel_context)
    return WeightView(
        module=module,
        table=weights.table,
        dtypes=weights.dtypes,
        owners=weights.owners,
        owned=weights.owned,
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
