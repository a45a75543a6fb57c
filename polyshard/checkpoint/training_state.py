"""The training state: weights, optimizer, step, random states and data positions.

A training state is a Hugging Face directory, so any program can read its weights. The optimizer's tensors are stored
beside them, under the weights' names and in their logical shapes, so the state loads into any adapter and any sizes.

    step-00000100/
      config.json  model.safetensors  ...     as written by `save_checkpoint`
      training/exp_avg.safetensors  ...       one or more files for each optimizer slot
      training/random.safetensors             generator states of every rank
      polyshard.json                          checksums, step, optimizer, data positions
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.data_positions import plain_json, position_of, restore_data
from polyshard.checkpoint.directory import find
from polyshard.checkpoint.load import read_pieces
from polyshard.checkpoint.location import as_path
from polyshard.checkpoint.manifest import verify_files
from polyshard.checkpoint.optimizer_state import (
    check_optimizer,
    describe,
    held_slots,
    saved_state,
    stored_pieces,
    warn_of_groups,
    warn_of_rate,
)
from polyshard.checkpoint.part import StoredPart, check_same_base, fingerprints, part_of
from polyshard.checkpoint.pending import PendingSave
from polyshard.checkpoint.plan import PlannedFile, plan_files
from polyshard.checkpoint.random_states import RANDOM, random_states, restore_random, sizes
from polyshard.checkpoint.save import (
    MAX_SHARD_BYTES,
    SaveJob,
    model_documents,
    stored_tensors,
    weight_files,
)
from polyshard.checkpoint.state_files import (
    FOLDER,
    KIND,
    OpenedState,
    by_reader,
    check_engine,
    checked_step,
    open_state,
)
from polyshard.checkpoint.storage import Progress
from polyshard.core.adapter import TrainingEngine
from polyshard.core.computation import difference, whole_computation
from polyshard.core.context import ParallelContext
from polyshard.core.pieces import OptimizerState, Piece
from polyshard.core.ranks import Ranks
from polyshard.core.serving import RegisteredModel
from polyshard.core.weight_table import WeightTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The result of loading a training state, besides the weights.

    Attributes:
        step: the step as saved.
        data: the data position of this data-parallel rank; None if the number of data-parallel ranks changed and their
            positions differed.
        data_positions: the saved positions of all data-parallel ranks.
        carried: the parts that were restored: a subset of `"weights"`, `"optimizer"` and `"random"`.

    Examples:
        >>> state = TrainingState(step=9, data=None, data_positions=(), carried=frozenset({"weights"}))
        >>> "optimizer" in state.carried
        False
    """

    step: int
    data: Any
    data_positions: tuple[Any, ...]
    carried: frozenset[str]


def save_training_state(
    engine: TrainingEngine,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    step: int,
    config: Mapping[str, Any] | Any,
    data: Any = None,
    architecture: str | None = None,
    factory: str | RegisteredModel | None = None,
    companions: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    asynchronous: bool = False,
    progress: Progress | None = None,
) -> Path | PendingSave:
    """Write everything that is needed to resume training. A collective: every rank must call it.

    Of a model with a LoRA adapter (`polyshard.add_lora`), the state holds the adapter, as PEFT stores it, and the
    fingerprints of the frozen weights, which it does not copy.

    Args:
        engine: the training engine.
        directory: the target, such as `runs/a/step-00000100`; `latest_checkpoint("runs/a")` finds the newest.
            A checkpoint there is replaced atomically; other files are kept.
        parallel_context: the context of the engine.
        step: the training step, by which `latest_checkpoint` orders.
        config: fields of config.json: a mapping, a `ModelConfig`, or an object with `to_dict`.
        data: this data-parallel rank's position in its data, and whatever else a run must remember: JSON, an object
            with a `state_dict` of JSON, such as a `StepLoader`, or a mapping of names to them.
        architecture: this and the remaining arguments are those of `save_checkpoint`.

    Returns:
        The directory, or the pending save.

    Raises:
        CheckpointError: a rank could not write, or `data` is not JSON; raised on every rank, naming the rank.
        ConfigurationError: `engine` is a model, or `step` is not an integer.

    Examples:
        >>> context = ps.initialize("torch")
        >>> engine = ps.load_adapter("torch").engine(torch.nn.Linear(2, 2), ps.AdamW(), context)
        >>> save_training_state(engine, "run/step-100", context, step=100, config={}, data={"row": 7})
        PosixPath('run/step-100')
    """
    check_engine(engine)
    step = checked_step(step)
    if engine.has_gradients:
        logger.warning(
            "%s leaves out the gradients of a step that is not finished: a run that resumes from it neither has them "
            "nor reads their rows again. Save after engine.step()",
            directory,
        )
    ranks = Ranks.of(parallel_context)
    part = part_of(engine.module)
    model = engine.model_weights
    table = model.table if part is None else part.table(model.table)
    failed = f"saving {directory} failed; nothing was changed"
    state = ranks.run_on_all(engine.optimizer_state, failed)  # one rank alone may hold what cannot be stored
    started = any(ranks.gather(state.started))
    weights = _of(table, engine.weight_pieces(), model.owned)
    optimizer = stored_pieces(_of(table, state.pieces, model.owned), started)
    dtypes = model.dtypes
    slot_dtypes = _slot_dtypes(optimizer, ranks)
    files = _weight_files(part, table, dtypes, max_shard_bytes)
    for slot, by_name in slot_dtypes.items():
        files += _in_folder(plan_files(slot, stored_tensors(table, by_name, slot), max_shard_bytes))

    data = ranks.run_on_all(lambda: plain_json(data), failed)
    first_of_replica = all(parallel_context.axis(a).rank == 0 for a in ("tensor", "context", "pipeline"))
    mine = (parallel_context.axis("data").rank, data) if first_of_replica else None
    positions = [d for _, d in sorted((x for x in ranks.gather(mine) if x is not None), key=lambda x: x[0])]
    layout = parallel_context.layout
    documents = model_documents(config, architecture, factory, dtypes, getattr(engine.module, "architecture", None))
    base: dict[str, Any] = {}
    if part is not None:
        documents |= part.documents()
        frozen = part.rest(model.table)
        base = part.state(fingerprints(_of(frozen, engine.weight_pieces(), model.owned), frozen, parallel_context))
    job = SaveJob(
        directory=as_path(directory),
        kind=KIND,
        pieces=[*weights, *optimizer],
        table=table,
        files=files,
        documents=documents,
        companions=None if companions is None else as_path(companions),
        state={
            "step": step,
            "optimizer": describe(state, slot_dtypes, started, ranks),
            "data": positions,
            "layout": sizes(layout),
            "computation": whole_computation(engine.module, model.table, parallel_context),
            **base,
        },
        blobs={f"{FOLDER}/{RANDOM}.safetensors": random_states(ranks)},
    )
    return job.start(parallel_context, asynchronous, progress)


def load_training_state(
    engine: TrainingEngine,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    data: Any = None,
    optimizer: bool = True,
    scheduler: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
) -> TrainingState:
    """Restore a saved state into an engine of any adapter and any sizes. If it does not match, nothing is changed.

    This is a collective: every rank must call it. Each rank reads only its own elements, into its own memory. At the
    sizes of the save, random states are restored as well, and training continues bit for bit. At other sizes a
    data-parallel rank takes the random states of its position, with a warning.

    Args:
        engine: the training engine, built as for a new run.
        directory: a directory written by `save_training_state`.
        parallel_context: the context of the engine.
        data: an object with `load_state_dict`, such as a `StepLoader`, or a mapping of names to such objects, in the
            place of those given to `save_training_state`; each continues from its saved state.
        optimizer: False to load only the weights and start with a new optimizer and schedule.
        scheduler: False to keep the engine's learning rate or schedule, which begins at its start.
        verify: compare each file's checksum with the manifest.
        progress: called with (elements read, total elements) of this rank.

    Raises:
        CheckpointError: the checkpoint is truncated or altered, does not match the model, its optimizer state is
            incompatible with the engine's optimizer, or it has no state for `data`; the message says what can be
            restored. Or a LoRA adapter was trained over other weights than the model's.
        ConfigurationError: an object of `data` rejects its state.

    Examples:
        >>> context = ps.initialize("torch")
        >>> engine = ps.load_adapter("torch").engine(torch.nn.Linear(2, 2), ps.AdamW(), context)
        >>> directory = ps.save_training_state(engine, "run/step-100", context, step=100, config={}, data={"row": 7})
        >>> state = load_training_state(engine, directory, context)
        >>> state.step, state.data, sorted(state.carried)
        (100, {'row': 7}, ['optimizer', 'random', 'weights'])
    """
    check_engine(engine)
    ranks = Ranks.of(parallel_context)
    path = ranks.run_on_all(lambda: find(directory), f"{directory} cannot be loaded")
    axis = parallel_context.axis("tensor")
    part = part_of(engine.module)
    model = engine.model_weights
    table = model.table if part is None else part.table(model.table)
    before: OptimizerState = engine.optimizer_state()
    held = held_slots(_of(table, before.pieces), ranks)

    def opened_and_checked() -> OpenedState:
        opened = open_state(path, table, part)
        if optimizer:
            saved = opened.manifest.state["optimizer"]
            check_optimizer(saved, before, held, opened.slots, table, scheduler=scheduler)
        return opened

    what = f"{path} cannot be loaded; nothing was changed"
    opened = ranks.run_on_all(opened_and_checked, what)
    if verify:
        verify_files(path, opened.manifest, ranks)
    positions = tuple(opened.manifest.state["data"])
    position = position_of(positions, parallel_context.axis("data"))
    if part is not None:
        frozen = part.rest(model.table)
        found = fingerprints(_of(frozen, engine.weight_pieces(), model.owned), frozen, parallel_context)
        other = check_same_base(opened.manifest.state["base"], found, part.what)
        if other and ranks.rank == 0:
            logger.warning("%s frozen tensors have another dtype than in %s and were not compared", len(other), path)
    computed = whole_computation(engine.module, model.table, parallel_context)
    other = difference(opened.manifest.state.get("computation", {}), computed, ("the state", "the engine's model"))
    if other is not None and ranks.rank == 0:
        logger.warning("the model computes differently than when %s was saved: %s", path, other)
    if data is not None:
        ranks.run_on_all(lambda: restore_data(data, position, len(positions)), what)

    carried = {"weights"}
    for pieces in by_reader(_of(table, engine.weight_pieces()), opened, table):
        read_pieces(*pieces, table, axis.rank, axis.size, progress)
    engine.weights_written()
    saved = opened.manifest.state
    if optimizer:
        state = engine.optimizer_state()  # after `weights_written`, which refreshes the fp32 copies
        stored = stored_pieces(_of(table, state.pieces), saved["optimizer"].get("started", True))
        for pieces in by_reader(stored, opened, table):
            read_pieces(*pieces, table, axis.rank, axis.size, progress)
        engine.optimizer_written(saved_state(saved["optimizer"], before, scheduler=scheduler))
        warn_of_groups(saved["optimizer"], before, ranks)
        if scheduler:
            warn_of_rate(saved["optimizer"], before, ranks)
        carried.add("optimizer")
    if restore_random(path / FOLDER, saved["layout"], parallel_context, ranks):
        carried.add("random")
    return TrainingState(step=saved["step"], data=position, data_positions=positions, carried=frozenset(carried))


def _of(table: WeightTable, pieces: Iterable[Piece], owned: Collection[str] | None = None) -> list[Piece]:
    """Return the pieces of a table's parameters, and only those that this rank stores if `owned` is given."""
    return [p for p in pieces if p.parameter in table and (owned is None or p.parameter in owned)]


def _weight_files(
    part: StoredPart | None, table: WeightTable, dtypes: Mapping[str, torch.dtype], limit: int
) -> list[PlannedFile]:
    return weight_files(table, dtypes, limit) if part is None else [part.file(stored_tensors(table, dtypes))]


def _slot_dtypes(pieces: list[Piece], ranks: Ranks) -> dict[str, dict[str, torch.dtype]]:
    """Return the dtype of each parameter's state for each slot; a rank may hold no part of some parameters."""
    mine: dict[str, dict[str, torch.dtype]] = {}
    for piece in pieces:
        mine.setdefault(piece.slot, {})[piece.parameter] = piece.values.dtype
    result: dict[str, dict[str, torch.dtype]] = {}
    for part in ranks.gather(mine):
        for slot, by_name in part.items():
            result.setdefault(slot, {}).update(by_name)
    return {slot: result[slot] for slot in sorted(result)}


def _in_folder(files: list[PlannedFile]) -> list[PlannedFile]:
    return [PlannedFile(f"{FOLDER}/{file.path}", file.tensors) for file in files]
