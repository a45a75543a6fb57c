"""The optimizer's part of a training state: what is written of it, and whether an engine can take it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from polyshard.checkpoint.files import TensorReader
from polyshard.core.errors import CheckpointError
from polyshard.core.pieces import MASTER, OptimizerState, Piece
from polyshard.core.ranks import Ranks
from polyshard.core.weight_table import WeightTable
from polyshard.training.schedule import check_schedule

logger = logging.getLogger(__name__)


def stored_pieces(pieces: Iterable[Piece], started: bool) -> list[Piece]:
    """Return the pieces that are stored: the others are places for state that the first update will create."""
    return [piece for piece in pieces if started or piece.slot == MASTER]


def describe(state: OptimizerState, slots: Iterable[str], started: bool, ranks: Ranks) -> dict[str, Any]:
    """Return the manifest's entry of an optimizer, as plain JSON. A collective.

    Args:
        state: of this rank.
        slots: that are stored.
        started: whether any rank's state has been updated.
        ranks: of the job.
    """
    scalars = {name: value for part in ranks.gather(dict(state.scalars)) for name, value in part.items()}
    by_settings: dict[tuple[float, float], list[str]] = {}
    for name, found in sorted(_groups_of_all(state, ranks).items()):
        by_settings.setdefault((found["lr_scale"], found["weight_decay"]), []).append(name)
    return {
        "kind": state.kind,
        "step": state.step,
        "lr": state.lr,
        "slots": sorted(slots),
        "started": started,
        "scalars": scalars if started else {},
        "schedule": state.schedule,
        "loss_scale": None if state.loss_scale is None else dict(state.loss_scale),
        "groups": [
            {"lr_scale": scale, "weight_decay": decay, "parameters": names}
            for (scale, decay), names in by_settings.items()
        ],
    }


def saved_state(saved: Mapping[str, Any], mine: OptimizerState, *, scheduler: bool) -> OptimizerState:
    """Return the state that an engine continues from.

    Args:
        saved: the manifest's entry; older ones lack `started`, `scalars`, `schedule`, `groups` and `loss_scale`.
        mine: the engine's state before the load.
        scheduler: False to keep the engine's own rate and schedule.
    """
    return OptimizerState(
        kind=saved["kind"],
        step=saved["step"],
        lr=saved["lr"] if scheduler else mine.lr,
        pieces=(),
        schedule=saved.get("schedule") if scheduler else None,
        started=saved.get("started", True),
        scalars=saved.get("scalars", {}),
        loss_scale=saved.get("loss_scale"),
    )


def check_optimizer(
    saved: Mapping[str, Any],
    mine: OptimizerState,
    held: Mapping[str, set[str]],
    readers: Mapping[str, TensorReader],
    table: WeightTable,
    *,
    scheduler: bool,
) -> None:
    """Check that an engine can take a saved optimizer state.

    Args:
        saved: the manifest's entry.
        mine: the engine's state.
        held: the parameters of each slot, by their names in the built model, over all ranks.
        readers: of the saved slots.
        table: the model's.
        scheduler: whether the schedule is restored.

    Raises:
        CheckpointError: the optimizers, the parameters that have state, or the schedules differ.
    """
    start_anew = (
        "Pass optimizer=False to restore weights, step, data positions and random states and to start with a new "
        "optimizer."
    )
    known = set(saved["slots"]) - {MASTER}
    slots = held.keys() - {MASTER} if saved.get("started", True) else known
    if saved["kind"] != mine.kind or slots != known:
        raise CheckpointError(
            f"the optimizer state is incompatible: got {saved['kind']!r} with {sorted(known)}, expected {mine.kind!r} "
            f"with {sorted(slots)}. {start_anew}"
        )
    for slot in sorted(slots):
        stored = readers[slot].where.keys()
        wanted = {entry.name: {*entry.checkpoint_names, *entry.tied_names} for entry in table.values()}
        trained = {table[parameter].name for parameter in held[slot]}
        with_state = {name for name, names in wanted.items() if names & stored}
        missing, unexpected = sorted(trained - with_state), sorted(with_state - trained)
        if missing or unexpected:
            raise CheckpointError(
                f"the optimizer state {slot!r} is of other parameters: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}. Freeze the same parameters as the run that saved it. {start_anew}"
            )
    if scheduler:
        check_schedule(mine.schedule, saved.get("schedule"))


def warn_of_groups(saved: Mapping[str, Any], state: OptimizerState, ranks: Ranks) -> None:
    """Warn if parameter groups differ from those of the run that saved the state. A collective.

    State belongs to parameters, so it is right in any groups. Rates and decays are those of the engine.
    """
    mine = _groups_of_all(state, ranks)
    before = {
        name: {"lr_scale": group["lr_scale"], "weight_decay": group["weight_decay"]}
        for group in saved.get("groups", ())
        for name in group["parameters"]
    }
    changed = [name for name in sorted(mine.keys() & before.keys()) if mine[name] != before[name]]
    if changed and ranks.rank == 0:
        logger.warning(
            "parameter groups differ from those of the saved run, and the engine's are used: %s has %s, had %s (%d "
            "parameters)",
            changed[0],
            mine[changed[0]],
            before[changed[0]],
            len(changed),
        )


def warn_of_rate(saved: Mapping[str, Any], before: OptimizerState, ranks: Ranks) -> None:
    """Warn if a saved learning rate without a schedule takes the place of the engine's."""
    if before.schedule is None and saved["lr"] != before.lr and ranks.rank == 0:
        logger.warning(
            "the learning rate continues at %s, that of the saved run, and not at the engine's, %s. Pass "
            "scheduler=False to keep the engine's",
            saved["lr"],
            before.lr,
        )


def held_slots(pieces: Iterable[Piece], ranks: Ranks) -> dict[str, set[str]]:
    """Return the parameters of each slot over all ranks. A collective."""
    mine: dict[str, set[str]] = {}
    for piece in pieces:
        mine.setdefault(piece.slot, set()).add(piece.parameter)
    found: dict[str, set[str]] = {}
    for part in ranks.gather(mine):
        for slot, names in part.items():
            found.setdefault(slot, set()).update(names)
    return found


def _groups_of_all(state: OptimizerState, ranks: Ranks) -> dict[str, dict[str, float]]:
    mine = {n: {"lr_scale": g.lr_scale, "weight_decay": g.weight_decay} for n, g in state.groups.items()}
    return {name: settings for part in ranks.gather(mine) for name, settings in part.items()}
