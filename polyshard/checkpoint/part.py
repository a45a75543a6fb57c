"""The part of a model that its training states store if most of its weights are frozen, such as LoRA matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from polyshard.checkpoint.files import TensorReader
from polyshard.checkpoint.plan import PlannedFile, StoredTensor
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError
from polyshard.core.pieces import Piece
from polyshard.core.ranks import Ranks
from polyshard.core.stages import Stages
from polyshard.core.weight_table import WeightTable
from polyshard.weights.fingerprint import fingerprint, text, total
from polyshard.weights.movement import shared_run
from polyshard.weights.regions import regions
from polyshard.weights.view import WeightView

_ATTRIBUTE = "stored_part"

Prints = dict[str, list[str]]  # dtype and fingerprint of each stored tensor


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """The trained parameters of a model with frozen weights, and how their file is written.

    Attributes:
        what: a word for the part, for messages.
        parameters: names of the parameters in the built model, on all pipeline stages.
        stem: name of the safetensors file, without the suffix.
        prefix: stands before each checkpoint name in that file.
        documents: returns the JSON files beside it, by name.
    """

    what: str
    parameters: frozenset[str]
    stem: str
    prefix: str
    documents: Callable[[], Mapping[str, Any]]

    def attach(self, module: nn.Module) -> None:
        """Store this on the model that contains the parameters; of a pipeline, call it for each stage."""
        setattr(module, _ATTRIBUTE, self)

    def table(self, table: WeightTable) -> WeightTable:
        """Return the entries of the part."""
        return WeightTable({name: entry for name, entry in table.items() if name in self.parameters})

    def rest(self, table: WeightTable) -> WeightTable:
        """Return the entries of the frozen weights."""
        return WeightTable({name: entry for name, entry in table.items() if name not in self.parameters})

    def file(self, tensors: Sequence[StoredTensor]) -> PlannedFile:
        """Return the planned file of these tensors, which have checkpoint names."""
        return PlannedFile(
            f"{self.stem}.safetensors", tuple(replace(tensor, name=self.prefix + tensor.name) for tensor in tensors)
        )

    def state(self, frozen: Prints) -> dict[str, Any]:
        """Return what the manifest of a training state records of the part and of the frozen weights."""
        return {"part": self.what, "base": frozen}

    def reader(self, directory: Path) -> TensorReader:
        """Return a reader of the part's file, by checkpoint names."""
        return TensorReader(directory, stem=self.stem, prefix=self.prefix)


def part_of(module: nn.Module) -> StoredPart | None:
    """Return the part that training states of a model store; None if they store all weights."""
    stage = next(iter(module)) if isinstance(module, Stages) else module
    return getattr(stage, _ATTRIBUTE, None)


def without_part(view: WeightView) -> WeightView:
    """Return the view of a model's frozen weights only; the view itself if none of them are."""
    part = part_of(view.module)
    if part is None:
        return view
    table = part.rest(view.table)
    frozen = [parameter for name, parameter in view.module.named_parameters() if name in table]
    return replace(
        view,
        table=table,
        pieces=lambda: (piece for piece in view.pieces() if piece.parameter in table),
        shards=lambda: ((name, shard) for name, shard in view.shards() if name in table),
        changes=lambda: sum(parameter._version for parameter in frozen),
        has_masters=False,
        masters=list,
    )


def check_kind(part: StoredPart | None, state: Mapping[str, Any], path: Path) -> None:
    """Raise `CheckpointError` if a training state holds all weights and the model trains a part, or the reverse."""
    held, wanted = state.get("part"), None if part is None else part.what
    if held != wanted:
        raise CheckpointError(
            f"{path} does not match the model: got a state of {held or 'all weights'}, expected one of "
            f"{wanted or 'all weights'}."
        )


def fingerprints(pieces: Iterable[Piece], table: WeightTable, context: ParallelContext) -> Prints:
    """Return dtype and fingerprint of each stored tensor, on every rank. A collective.

    Args:
        pieces: this rank's pieces; those of parameters outside of `table` are skipped.
        table: the entries.
        context: the parallel context.
    """
    axis = context.axis("tensor")
    mine: dict[str, tuple[str, int]] = {}
    for piece in pieces:
        if piece.parameter not in table:
            continue
        entry = table[piece.parameter]
        start, stop = shared_run(piece, entry.layout.local_shape(axis.rank, axis.size))
        for region in regions(entry, axis.rank, axis.size, start, stop):
            if region.first:
                values = region.view(piece.values, piece.start)
                before = mine.get(region.name, ("", 0))[1]
                dtype = str(values.dtype).removeprefix("torch.")
                mine[region.name] = (dtype, total((before, fingerprint(values, region.offsets))))
    parts = Ranks.of(context).gather(mine)
    found: Prints = {}
    for name in sorted({name for part in parts for name in part}):
        of_ranks = [part[name] for part in parts if name in part]
        found[name] = [of_ranks[0][0], text(total(value for _, value in of_ranks))]
    return found


def check_same_base(saved: Prints, found: Prints, what: str) -> list[str]:
    """Raise `CheckpointError` if a part was trained over other weights than those of this model.

    Returns:
        The tensors that cannot be compared because they are held in another dtype.
    """
    missing = sorted(set(saved) ^ set(found))
    other = [
        name for name in saved if name in found and saved[name][0] == found[name][0] and saved[name] != found[name]
    ]
    if missing or other:
        name = (other or missing)[0]
        raise CheckpointError(
            f"the {what} was trained over other weights: {len(other) + len(missing)} frozen tensors differ from those "
            f"of this model, such as {name!r}. Load the same base checkpoint first."
        )
    return [name for name in saved if saved[name][0] != found[name][0]]
