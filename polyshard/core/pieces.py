"""What a training engine holds, as runs of the tensor-parallel shards: the same view on every library's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from polyshard.core.context import ParallelAxis

WEIGHT = "weight"  # the slot of the parameters themselves
MASTER = "master"  # the optimizer's own copy of a parameter, in a wider dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of consecutive elements of this rank's tensor-parallel shard of a parameter, or of its optimizer state.

    Attributes:
        parameter: name in the model as built.
        slot: `"weight"`, `"master"`, or the optimizer's own name (`"exp_avg"`).
        start: first element, in the flattened shard.
        values: 1-D, the library's own memory: what is written there takes effect (see `weights_written` and
            `optimizer_written` of `TrainingEngine`).
        holder: this rank's position among the replicas that hold this very run.
        holders: how many there are.
    """

    parameter: str
    slot: str
    start: int
    values: torch.Tensor
    holder: int = 0
    holders: int = 1


def held_alike(parameter: str, slot: str, values: torch.Tensor, replicas: ParallelAxis) -> Piece:
    """The piece of a whole shard that every rank of the replica axis holds alike; `values` must be contiguous."""
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
    """An optimizer's state.

    Attributes:
        kind: what the slots mean: `"adam"` for Adam and AdamW of any library, else the optimizer's qualified class.
        step: updates done.
        lr: the learning rate of the next.
        pieces: of every slot, on this rank.
    """

    kind: str
    step: int
    lr: float
    pieces: Iterable[Piece]
