"""The files of a training state: opened, checked, and read piece by piece."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.checkpoint.files import TensorReader
from polyshard.checkpoint.load import check_fit, known_names
from polyshard.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from polyshard.checkpoint.part import StoredPart, check_kind
from polyshard.checkpoint.quantization.reading import refuse_quantized
from polyshard.core.errors import CheckpointError, ConfigurationError
from polyshard.core.pieces import MASTER, WEIGHT, Piece
from polyshard.core.weight_table import IGNORED_TENSORS, WeightTable

KIND = "training-state"
FOLDER = "training"


@dataclass(frozen=True, slots=True)
class OpenedState:
    """A training state's manifest, and readers of its weights and of each optimizer slot."""

    manifest: Manifest
    weights: TensorReader
    slots: Mapping[str, TensorReader]


def open_state(path: Path, table: WeightTable, part: StoredPart | None) -> OpenedState:
    """Open a training state and check that it fits the model; nothing is read yet.

    Raises:
        CheckpointError: it is incomplete, of another kind, quantized, or does not match the model.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    manifest = read_manifest(path)
    if manifest is None:
        raise CheckpointError(f"{path} is not a complete training state: {MANIFEST} is missing")
    if manifest.kind != KIND:
        raise CheckpointError(f"{path} holds only {manifest.kind}. Load it with load_checkpoint.")
    check_kind(part, manifest.state, path)
    weights = TensorReader(path) if part is None else part.reader(path)
    refuse_quantized(path, weights, known_names(table), IGNORED_TENSORS)
    check_fit(table, weights, IGNORED_TENSORS)
    slots = {slot: TensorReader(path / FOLDER, stem=slot) for slot in manifest.state["optimizer"]["slots"]}
    return OpenedState(manifest, weights, slots)


def by_reader(pieces: list[Piece], opened: OpenedState, table: WeightTable) -> list[tuple[TensorReader, list[Piece]]]:
    """Group pieces by reader. fp32 masters stand in for weights of a narrower dtype, and the other way round."""
    groups: dict[int, tuple[TensorReader, list[Piece]]] = {}
    master = opened.slots.get(MASTER)
    for piece in pieces:
        if piece.slot in (WEIGHT, MASTER):
            entry = table[piece.parameter]
            names = {*entry.checkpoint_names, *entry.tied_names}
            wide = master is not None and piece.values.dtype == torch.float32 and not names.isdisjoint(master.where)
            reader = master if wide else opened.weights  # a frozen weight has no master
        else:
            reader = opened.slots[piece.slot]
        assert reader is not None
        groups.setdefault(id(reader), (reader, []))[1].append(piece)
    return list(groups.values())


def check_engine(engine: Any) -> None:
    """Raise `ConfigurationError` if it is a model, which has no training state."""
    if isinstance(engine, nn.Module):
        raise ConfigurationError(
            f"a training state is that of an engine: got the model {type(engine).__name__}. Pass the engine, or use "
            "save_checkpoint and load_checkpoint for a model."
        )


def checked_step(step: Any) -> int:
    """Return a step as an integer, by which `latest_checkpoint` orders; raise `ConfigurationError` if it is none."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigurationError(f"step is invalid: got {step!r}, expected an integer of 0 or more.")
    return number
