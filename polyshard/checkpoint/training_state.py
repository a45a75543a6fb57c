"""The full state of a training run: weights, optimizer, step, random states and data positions.

A training state is a Hugging Face directory (any program reads its weights) with the optimizer's tensors beside it,
under the weights' names and in their logical shapes: it loads into any adapter and any size.

    step-00000100/
      config.json  model.safetensors  ...     as `save_checkpoint` writes
      training/exp_avg.safetensors  ...       a file, or several, for each slot of the optimizer
      training/random.safetensors             generator states of every rank
      polyshard.json                          checksums, step, optimizer, data positions
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.directory import find
from polyshard.checkpoint.files import TensorReader
from polyshard.checkpoint.load import check_fit, known_names, read_pieces
from polyshard.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify_files
from polyshard.checkpoint.pending import PendingSave
from polyshard.checkpoint.plan import PlannedFile, plan_files
from polyshard.checkpoint.quantization.reading import refuse_quantized
from polyshard.checkpoint.save import (
    MAX_SHARD_BYTES,
    SaveJob,
    model_documents,
    stored_tensors,
    weight_files,
)
from polyshard.checkpoint.storage import Progress
from polyshard.core.adapter import TrainingEngine
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError
from polyshard.core.layout import ParallelLayout
from polyshard.core.pieces import MASTER, WEIGHT, OptimizerState, Piece
from polyshard.core.ranks import Ranks
from polyshard.core.serving import RegisteredModel
from polyshard.core.weight_table import IGNORED_TENSORS, WeightTable
from polyshard.training import generators

logger = logging.getLogger(__name__)

KIND = "training-state"
FOLDER = "training"
RANDOM = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What a loaded state says beside the weights.

    Attributes:
        step: as it was saved.
        data: this data-parallel rank's position; None where the number of these ranks changed and they differed.
        data_positions: of every data-parallel rank, as it was saved.
        carried: what was taken over: of `"weights"`, `"optimizer"` and `"random"`.
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
    """Write everything that the run needs to go on. A collective: every rank calls it.

    Args:
        engine: the training engine.
        directory: such as `runs/a/step-00000100`: `latest_checkpoint("runs/a")` finds the newest. Replaced where it
            exists, in one step.
        parallel_context: the context of the engine.
        step: of the run; `latest_checkpoint` goes by it.
        config: fields of config.json: a mapping, a `ModelConfig`, or anything with `to_dict`.
        data: this data-parallel rank's position in its data: anything that JSON holds (a loader's `state_dict()`).
        architecture: as in `save_checkpoint`; so are the others.

    Returns:
        The directory, or the save under way.

    Raises:
        CheckpointError: a rank could not write, or `data` is no JSON; raised on every rank, naming it.
    """
    ranks = Ranks.of(parallel_context)
    table = engine.table
    state = engine.optimizer_state()
    weights, optimizer = list(engine.weight_pieces()), list(state.pieces)
    dtypes = {name: parameter.dtype for name, parameter in engine.module.named_parameters()}
    slot_dtypes = _slot_dtypes(optimizer, ranks)
    files = weight_files(table, dtypes, max_shard_bytes)
    for slot, by_name in slot_dtypes.items():
        files += _in_folder(plan_files(slot, stored_tensors(table, by_name, slot), max_shard_bytes))

    data = ranks.together(lambda: _plain_json(data), f"saving {directory} failed, and nothing was changed")
    first_of_replica = all(parallel_context.axis(a).rank == 0 for a in ("tensor", "context", "pipeline"))
    mine = (parallel_context.axis("data").rank, data) if first_of_replica else None
    positions = [d for _, d in sorted((x for x in ranks.gather(mine) if x is not None), key=lambda x: x[0])]
    layout = parallel_context.layout
    job = SaveJob(
        directory=Path(directory),
        kind=KIND,
        pieces=[*weights, *optimizer],
        table=table,
        files=files,
        documents=model_documents(config, architecture, factory, dtypes, getattr(engine.module, "architecture", None)),
        companions=None if companions is None else Path(companions),
        state={
            "step": step,
            "optimizer": {"kind": state.kind, "step": state.step, "lr": state.lr, "slots": sorted(slot_dtypes)},
            "data": positions,
            "layout": {"tensor": layout.tensor, "data": layout.data, "context": layout.context},
        },
        blobs={f"{FOLDER}/{RANDOM}.safetensors": _random_states(ranks)},
    )
    return job.start(parallel_context, asynchronous, progress)


def _plain_json(data: Any) -> Any:
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"data has to be plain JSON (numbers, strings, lists, dicts): {problem}") from problem


def load_training_state(
    engine: TrainingEngine,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    optimizer: bool = True,
    verify: bool = True,
    progress: Progress | None = None,
) -> TrainingState:
    """Set an engine to a saved state, of any adapter and any size. Nothing is changed where it does not fit.

    Each rank reads its own elements into its own memory. A collective: every rank calls it. At the sizes of the save,
    random states are restored too, and the run goes on bit for bit. At other sizes a data-parallel rank takes the
    states that its position had, and a warning says so.

    Args:
        engine: the training engine, built as for a new run.
        directory: of `save_training_state`.
        parallel_context: the context of the engine.
        optimizer: False takes the weights alone, and begins with a new optimizer.
        verify: compare each file's checksum.
        progress: called with (elements read, elements in all) of this rank.

    Raises:
        CheckpointError: the checkpoint is torn or altered, does not fit the model, or its optimizer's state means
            something else than this engine's; the message says what can be carried over.
    """
    path, ranks = find(directory), Ranks.of(parallel_context)
    axis = parallel_context.axis("tensor")
    table = engine.table
    before: OptimizerState = engine.optimizer_state()
    slots = set().union(*ranks.gather({piece.slot for piece in before.pieces}))

    def opened_and_checked() -> _Opened:
        opened = _open(path, table)
        if optimizer:
            _check_optimizer(opened.manifest, before.kind, slots)
        return opened

    opened = ranks.together(opened_and_checked, f"{path} cannot be loaded; nothing was changed")
    if verify:
        verify_files(path, opened.manifest, ranks)

    carried = {"weights"}
    for pieces in _by_reader(list(engine.weight_pieces()), opened):
        read_pieces(*pieces, table, axis.rank, axis.size, progress)
    engine.weights_written()
    saved = opened.manifest.state
    if optimizer:
        state = engine.optimizer_state()  # after the weights: its fp32 copies were refreshed from them
        for pieces in _by_reader(list(state.pieces), opened):
            read_pieces(*pieces, table, axis.rank, axis.size, progress)
        engine.optimizer_written(saved["optimizer"]["step"], saved["optimizer"]["lr"])
        carried.add("optimizer")
    if _restore_random(path, saved["layout"], parallel_context, ranks):
        carried.add("random")
    positions = tuple(saved["data"])
    same = len(positions) == parallel_context.axis("data").size
    data = positions[parallel_context.axis("data").rank] if same else None
    if not same and positions and all(position == positions[0] for position in positions):
        data = positions[0]
    return TrainingState(step=saved["step"], data=data, data_positions=positions, carried=frozenset(carried))


@dataclass(frozen=True, slots=True)
class _Opened:
    manifest: Manifest
    weights: TensorReader
    slots: Mapping[str, TensorReader]


def _open(path: Path, table: WeightTable) -> _Opened:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    manifest = read_manifest(path)
    if manifest is None:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is no training state, or its save was cut off")
    if manifest.kind != KIND:
        raise CheckpointError(f"{path} holds {manifest.kind} alone; load it with load_checkpoint")
    weights = TensorReader(path)
    refuse_quantized(path, weights, known_names(table), IGNORED_TENSORS)
    check_fit(table, weights, IGNORED_TENSORS)
    slots = {slot: TensorReader(path / FOLDER, stem=slot) for slot in manifest.state["optimizer"]["slots"]}
    return _Opened(manifest, weights, slots)


def _by_reader(pieces: list[Piece], opened: _Opened) -> list[tuple[TensorReader, list[Piece]]]:
    """Where each piece is read from: fp32 copies stand in for weights in a narrower dtype, and the other way round."""
    groups: dict[int, tuple[TensorReader, list[Piece]]] = {}
    for piece in pieces:
        if piece.slot in (WEIGHT, MASTER):
            master = opened.slots.get(MASTER)
            reader = master if master is not None and piece.values.dtype == torch.float32 else opened.weights
        else:
            reader = opened.slots[piece.slot]
        groups.setdefault(id(reader), (reader, []))[1].append(piece)
    return list(groups.values())


def _check_optimizer(manifest: Manifest, kind: str, slots: set[str]) -> None:
    saved = manifest.state["optimizer"]
    mine, held = slots - {MASTER}, set(saved["slots"]) - {MASTER}
    if saved["kind"] != kind or mine != held:
        raise CheckpointError(
            f"the checkpoint's optimizer is {saved['kind']!r} with {sorted(held)}, this engine's is {kind!r} "
            f"with {sorted(mine)}: their states mean different things. Weights, step, data positions and random "
            "states can be carried over: pass optimizer=False to begin with a new optimizer"
        )


def _slot_dtypes(pieces: list[Piece], ranks: Ranks) -> dict[str, dict[str, torch.dtype]]:
    """For each slot the dtype of each parameter's state; a rank may hold no part of some."""
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


def _random_states(ranks: Ranks) -> dict[str, torch.Tensor]:
    states = ranks.gather(generators.all_states())
    return {f"{rank:05d}.{name}": value for rank, state in enumerate(states) for name, value in state.items()}


def _restore_random(path: Path, saved: Mapping[str, Any], context: ParallelContext, ranks: Ranks) -> bool:
    """Set the generators; False where this rank's could not be carried over.

    At the sizes of the save every rank takes its own states. At other tensor-parallel and context-parallel sizes it
    takes those of the first rank that had its data-parallel position: with `polyshard.manual_seed` all of these were
    equal. A data-parallel position that the save did not have gets a seed from the first rank's next draw and its
    number.
    """
    now, reader = context.layout, TensorReader(path / FOLDER, stem=RANDOM)
    same = dict(saved) == {"tensor": now.tensor, "data": now.data, "context": now.context}
    data = context.axis("data").rank
    known = data < saved["data"]
    source = ranks.rank
    if not same:
        layout = ParallelLayout(**saved)
        source = layout.groups("data")[0][data if known else 0]  # the first group's other coordinates are all 0
        if ranks.rank == 0:
            logger.warning(
                "random states were saved at tensor %s, data %s, context %s: each data-parallel rank goes on with "
                "those of the first rank at its position, and the run is not that of one that was not interrupted",
                *(saved[name] for name in ("tensor", "data", "context")),
            )
    prefix = f"{source:05d}."
    generators.restore({n.removeprefix(prefix): reader.tensor(n) for n in reader.where if n.startswith(prefix)})
    if not known:
        seed = int(torch.randint(2**62, (), device="cpu"))
        generators.seed_all(generators.mixed(seed, data))
    return known
