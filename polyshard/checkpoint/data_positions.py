"""Positions in the data that a training state stores: JSON, and the objects whose state it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.core.context import ParallelAxis
from polyshard.core.errors import CheckpointError


def plain_json(data: Any) -> Any:
    """Return data as JSON, with objects replaced by their `state_dict`.

    Raises:
        CheckpointError: something is neither JSON nor has a `state_dict`, or a key is not a string.
    """
    if callable(getattr(data, "state_dict", None)):
        return plain_json(data.state_dict())
    if data is None or isinstance(data, str | int | float):
        return data
    if isinstance(data, list | tuple):
        return [plain_json(item) for item in data]
    # The json module would turn keys of numbers into strings, which are then missing from what is loaded.
    if isinstance(data, Mapping) and all(isinstance(key, str) for key in data):
        return {key: plain_json(value) for key, value in data.items()}
    shown = f"keys {list(data)[:3]}" if isinstance(data, Mapping) else type(data).__name__
    raise CheckpointError(
        f"data is not plain JSON: got {shown}, expected numbers, strings, lists, dicts with keys of strings, and "
        "objects whose state_dict is made of them."
    )


def position_of(positions: tuple[Any, ...], axis: ParallelAxis) -> Any:
    """Return a rank's own position, or at another number of ranks the position that all saved ranks share."""
    if len(positions) == axis.size:
        return positions[axis.rank]
    return positions[0] if positions and all(position == positions[0] for position in positions) else None


def restore_data(data: Any, position: Any, saved_ranks: int) -> None:
    """Give a saved position to an object with `load_state_dict`, or the parts of one to a mapping of such objects.

    Raises:
        CheckpointError: there is no position, or no part for some name.
    """
    if position is None:
        raise CheckpointError(
            f"there is no position for data: the state has none, or different ones of {saved_ranks} data-parallel "
            "ranks, which cannot be divided over another number of them. Omit data=, and see data_positions."
        )
    if callable(getattr(data, "load_state_dict", None)):
        data.load_state_dict(position)
        return
    if not isinstance(data, Mapping):
        raise CheckpointError(f"data is invalid: got {type(data).__name__}, expected an object with load_state_dict.")
    missing = sorted(set(data) - set(position if isinstance(position, Mapping) else ()))
    if missing:
        raise CheckpointError(f"data has no saved state for {missing}. Load with the names that the save was given.")
    for name, part in data.items():
        part.load_state_dict(position[name])
