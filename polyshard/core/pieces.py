"""Pieces: a library-independent view of the parameters and optimizer state that a training engine holds on a rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from polyshard.core.context import ParallelAxis
from polyshard.core.parameter_groups import GroupSettings

WEIGHT = "weight"  # the slot of the parameters
MASTER = "master"  # the slot of the optimizer's copy of the parameters in a wider dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of consecutive elements of this rank's tensor-parallel shard of a parameter, or of its optimizer state.

    Attributes:
        parameter: name of the parameter in the built model.
        slot: `"weight"`, `"master"`, or the optimizer's name for the state tensor (`"exp_avg"`).
        start: index of the first element in the flattened shard.
        values: 1-D tensor in the library's memory. Writing to it changes the engine's state (see `weights_written` and
            `optimizer_written` of `TrainingEngine`).
        holder: this rank's position among the ranks that hold the same run.
        holders: the number of ranks that hold the same run.

    Examples:
        >>> context = ps.initialize("torch")
        >>> layer = ps.column_parallel(4, 2, context)
        >>> engine = ps.load_adapter("torch").engine(layer, ps.AdamW(), context)
        >>> [(piece.parameter, piece.start, len(piece.values)) for piece in engine.weight_pieces()]
        [('weight', 0, 8)]
    """

    parameter: str
    slot: str
    start: int
    values: torch.Tensor
    holder: int = 0
    holders: int = 1


def replicated_piece(parameter: str, slot: str, values: torch.Tensor, replicas: ParallelAxis) -> Piece:
    """Return the piece for a full shard that every rank of the replica axis holds; `values` must be contiguous."""
    return Piece(
        parameter=parameter,
        slot=slot,
        start=0,
        values=values.view(-1),
        holder=replicas.rank,
        holders=replicas.size,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """The state of an optimizer on this rank.

    Attributes:
        kind: the meaning of the slots: `"adam"` for Adam and AdamW of any library, else the optimizer's qualified class
            name.
        step: number of completed updates.
        lr: learning rate of the next update, of a parameter group with scale 1.
        pieces: the pieces of all slots on this rank.
        schedule: the state of the scheduler as plain JSON; None without one.
        started: False if the slots only hold places for state that the first update will create.
        scalars: numbers besides the count of steps that the optimizer keeps, equal for all parameters (NAdam's
            `mu_product`).
        groups: learning-rate scale and weight decay of each trained parameter, by its canonical name.
        loss_scale: of a float16 run: the `factor` on the loss, and the numbers that decide its next change; None
            without one.

    Examples:
        >>> context = ps.initialize("torch")
        >>> layer = ps.column_parallel(4, 2, context)
        >>> state = ps.load_adapter("torch").engine(layer, ps.AdamW(), context).optimizer_state()
        >>> state.kind, state.step, [piece.slot for piece in state.pieces]
        ('adam', 0, ['exp_avg', 'exp_avg_sq'])
    """

    kind: str
    step: int
    lr: float
    pieces: Iterable[Piece]
    schedule: Mapping[str, Any] | None = None
    started: bool = True
    scalars: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, GroupSettings] = field(default_factory=dict)
    loss_scale: Mapping[str, float] | None = None
