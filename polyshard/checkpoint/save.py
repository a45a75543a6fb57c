"""Saving a model of any adapter and any parallel sizes as a Hugging Face directory, written atomically by all ranks."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException, save

from polyshard.checkpoint.companions import copy_companions
from polyshard.checkpoint.directory import begin, behind_link, publish, staging_name
from polyshard.checkpoint.files import INDEX
from polyshard.checkpoint.location import as_path, is_remote
from polyshard.checkpoint.manifest import FileRecord, Manifest, record_files, write_manifest
from polyshard.checkpoint.model_code import check_code
from polyshard.checkpoint.part import part_of
from polyshard.checkpoint.pending import PendingSave
from polyshard.checkpoint.plan import PlannedFile, StoredTensor, index_of, plan_files
from polyshard.checkpoint.remote.requests import write_file
from polyshard.checkpoint.remote.save import save_remotely
from polyshard.checkpoint.storage import LayoutPlanner, LayoutWriter, Progress, storage_key
from polyshard.config.fields import MODEL_TYPE, config_fields
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError, ConfigurationError
from polyshard.core.pieces import WEIGHT, Piece
from polyshard.core.ranks import Ranks
from polyshard.core.serving import RegisteredModel, as_entry
from polyshard.core.weight_table import WeightTable, stored_shape
from polyshard.weights.fingerprint import text
from polyshard.weights.view import view_weights

logger = logging.getLogger(__name__)

_CODE_ADVICE = "Pass companions=DIRECTORY, which holds it, or take auto_map out of the config."

_NOT_SHARED = (
    "this rank does not see the directory that rank 0 has created. All ranks must see the same file system. Save to a "
    "shared one, or to an object store by its URL."
)

MAX_SHARD_BYTES = 5 * 10**9


def save_checkpoint(
    model: nn.Module | Any,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    config: Mapping[str, Any] | Any,
    architecture: str | None = None,
    factory: str | RegisteredModel | None = None,
    companions: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    asynchronous: bool = False,
    progress: Progress | None = None,
) -> Path | PendingSave:
    """Write weights, configuration and companion files to a Hugging Face directory.

    This is a collective: every rank must call it, and all ranks must see the same file system. Each rank writes the
    elements that it holds into the final files, through torch's distributed checkpoint; nothing is gathered. The files
    and their checksums are written beside `directory` and moved into place at the end, so a failed or killed save
    leaves the previous checkpoint untouched.

    With a URL as `directory`, ranks need no common local disk: each file is put together on one rank and uploaded by
    it, and the manifest is uploaded last.

    Args:
        model: a model as its factory built it, or the training engine around one.
        directory: the target, a path or a URL of fsspec such as `s3://bucket/name`. A checkpoint there is replaced
            atomically; other files are kept.
        parallel_context: the context that the model was built with.
        config: fields of config.json: a mapping, a `ModelConfig`, or an object with `to_dict`.
        architecture: entry of `architectures` in config.json, the name under which a server has the model registered.
        factory: `module:attribute` of the factory, or the result of `polyshard.register_model`. It is recorded in
            config.json with all its options, for `polyshard serve --trust-checkpoint`.
        companions: a directory of the same model or its URL, from which all files but weights and training state are
            copied: tokenizer, chat templates, generation configuration, and the Python files that `auto_map` names.
        dtype: dtype to store; by default that of each parameter.
        max_shard_bytes: size above which weights are split over several files.
        asynchronous: copy the weights to CPU memory, write them in the background, and return a `PendingSave`.
        progress: called with (elements written, total elements) of this rank.

    Returns:
        The directory, or the pending save.

    Raises:
        CheckpointError: a rank could not write; raised on every rank, naming the rank. Or the model has a LoRA adapter.
        ConfigurationError: an argument is invalid.

    Examples:
        >>> context = ps.initialize("torch")
        >>> model = torch.nn.Linear(2, 2)
        >>> directory = save_checkpoint(model, "out", context, config={"model_type": "example"})
        >>> sorted(path.name for path in directory.iterdir())
        ['config.json', 'model.safetensors', 'polyshard.json']
    """
    view = view_weights(model, parallel_context)
    part = part_of(view.module)
    if part is not None:
        raise CheckpointError(
            f"the model has a {part.what}, which is no part of a Hugging Face checkpoint. Save the adapter with "
            "polyshard.save_lora, or the sum of both with polyshard.save_merged_lora."
        )
    check_stored_dtype(dtype)
    dtypes = {name: dtype or found for name, found in view.dtypes.items()}
    job = SaveJob(
        directory=as_path(directory),
        kind="weights",
        pieces=view.owned_pieces(),
        table=view.table,
        files=weight_files(view.table, dtypes, max_shard_bytes),
        documents=model_documents(config, architecture, factory, dtypes, getattr(view.module, "architecture", None)),
        companions=None if companions is None else as_path(companions),
    )
    return job.start(parallel_context, asynchronous, progress)


def check_stored_dtype(dtype: Any) -> None:
    """Raise `ConfigurationError` unless weights can be converted to a dtype: None, or one of floating point."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigurationError(
            f"dtype is invalid: got {dtype!r}, expected None or a floating-point dtype, such as torch.bfloat16."
        )


def stored_tensors(table: WeightTable, dtypes: Mapping[str, torch.dtype], slot: str = WEIGHT) -> list[StoredTensor]:
    """Return the tensors that a checkpoint stores for these parameters, in the model's order."""
    return [
        StoredTensor(
            key=storage_key(slot, name),
            name=name,
            shape=stored_shape(entry.layout, len(entry.checkpoint_names), index),
            dtype=dtypes[entry.parameter],
        )
        for entry in table.values()
        if entry.parameter in dtypes
        for index, name in enumerate(entry.checkpoint_names)
    ]


def weight_files(table: WeightTable, dtypes: Mapping[str, torch.dtype], limit: int) -> list[PlannedFile]:
    """Return the planned files of a Hugging Face directory."""
    table.by_checkpoint_name()  # raises an error if two parameters have the same checkpoint name
    return plan_files("model", stored_tensors(table, dtypes), limit)


def model_documents(
    config: Mapping[str, Any] | Any,
    architecture: str | None,
    factory: str | RegisteredModel | None,
    dtypes: Mapping[str, torch.dtype],
    own_architecture: str | None = None,
    *,
    copied: bool = False,
) -> dict[str, Any]:
    """Return `config.json` as fields, without `quantization_config` unless the tensors are `copied` from the source.

    `own_architecture` is that of the model, used if the config names none.
    """
    fields = config_fields(config)
    if architecture is not None and not isinstance(architecture, str):
        raise ConfigurationError(
            f"architecture is invalid: got {architecture!r}, expected the name under which a server registers the "
            "model, such as 'MyModel'."
        )
    if factory is not None and not isinstance(factory, RegisteredModel):
        module, _, attribute = factory.partition(":") if isinstance(factory, str) else ("", "", "")
        if not module or not attribute:
            raise ConfigurationError(
                f"factory is invalid: got {factory!r}, expected 'module:attribute', such as 'my_model:build_model', or "
                "what ps.register_model returned."
            )
    if not copied and fields.pop("quantization_config", None):
        logger.warning("quantization_config is left out of config.json because the weights beside it are not quantized")
    if not fields.get("model_type"):
        fields["model_type"] = MODEL_TYPE
    if architecture is not None:
        fields["architectures"] = [architecture]
    elif own_architecture is not None and not fields.get("architectures"):
        fields["architectures"] = [own_architecture]
    if factory is not None:
        fields["polyshard"] = {"factory": factory} if isinstance(factory, str) else as_entry(factory)
    stored = {str(dtype).removeprefix("torch.") for dtype in dtypes.values()}
    if len(stored) == 1:
        fields["dtype"] = stored.pop()
        fields.pop("torch_dtype", None)
    try:
        json.dumps(fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the config is not plain JSON: {error}, expected numbers, strings, lists and dicts. Convert its values."
        ) from None
    return {"config.json": fields}


def save_config(
    directory: str | Path,
    config: Mapping[str, Any] | Any,
    *,
    architecture: str | None = None,
    factory: str | RegisteredModel | None = None,
) -> Path:
    """Write `config.json` only, for serving a model that has no checkpoint.

    Args:
        directory: created if it does not exist; other files in it are kept. A URL works, too.
        config: fields of config.json, as in `save_checkpoint`.
        architecture: the name under which a server has the model registered.
        factory: as in `save_checkpoint`.

    Returns:
        The directory.

    Raises:
        CheckpointError: the config is not a mapping of plain JSON.

    Examples:
        >>> save_config("out", {"hidden_size": 64}, architecture="MyModel")
        PosixPath('out')
        >>> ps.read_config("out").architectures
        ['MyModel']
    """
    path = as_path(directory)
    for name, fields in model_documents(config, architecture, factory, {}).items():
        written = json.dumps(fields, indent=2)
        if is_remote(path):
            write_file(path / name, written)
            continue
        path.mkdir(parents=True, exist_ok=True)
        part = path / staging_name(path / name)
        part.write_text(written)
        part.replace(path / name)
    return path


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """All inputs of a save, collected before it starts.

    Attributes:
        kind: kind of the manifest.
        pieces: the pieces of this rank.
        files: the planned files of all tensors.
        documents: JSON files that the first rank writes, by name.
        companions: a directory of the same model, or a `UPath`, to copy companion files from.
        state: state of the manifest.
        blobs: further safetensors files that the first rank writes, by relative path.
    """

    directory: Path
    kind: str
    pieces: Sequence[Piece]
    table: WeightTable
    files: Sequence[PlannedFile]
    documents: Mapping[str, Any]
    companions: Path | None = None
    state: Mapping[str, Any] | None = None
    blobs: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)

    def start(self, context: ParallelContext, asynchronous: bool, progress: Progress | None) -> Path | PendingSave:
        """Save now, or in the background from a copy of the pieces. Only one copy exists at a time."""
        for earlier in tuple(context.background):
            earlier.join()
        tensor = context.axis("tensor")
        if is_remote(self.directory):
            job = replace(self, pieces=[replace(p, values=_copy(p)) for p in self.pieces]) if asynchronous else self
            # Also a synchronous save: `PendingSave` has the process group of gloo that ranks exchange elements over.
            pending = PendingSave(context, lambda ranks: save_remotely(job, ranks, tensor.rank, tensor.size, progress))
            return pending if asynchronous else pending.wait()
        if not asynchronous:
            return self._run(Ranks.of(context), tensor.rank, tensor.size, progress)
        copied = [replace(piece, values=_copy(piece)) for piece in self.pieces]
        job = replace(self, pieces=copied)
        return PendingSave(context, lambda ranks: job._run(ranks, tensor.rank, tensor.size, progress))

    def _run(self, ranks: Ranks, tensor_rank: int, tensor_size: int, progress: Progress | None) -> Path:
        what = f"saving {self.directory} failed; nothing was changed"
        target = behind_link(self.directory)
        staging = target.parent / ranks.broadcast(staging_name(target))
        writer = LayoutWriter(staging, self.files, progress)
        stored = {tensor.key: tensor for file in self.files for tensor in file.tensors}
        planner = LayoutPlanner(self.pieces, self.table, tensor_rank, tensor_size, stored)
        try:
            ranks.raise_on_all(_attempt(begin, target, staging) if ranks.rank == 0 else None, what)
            ranks.raise_on_all(None if staging.is_dir() else CheckpointError(_NOT_SHARED), what)
            try:
                with ranks.guard("world checkpoint write"), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended in one process
                    save({}, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=ranks.is_single)
            except CheckpointException as failure:
                raise CheckpointError(f"{what}: {_describe(failure)}") from failure
            ranks.raise_on_all(_attempt(self.add_documents, staging) if ranks.rank == 0 else None, what)
            with ThreadPoolExecutor(1) as pool:
                flushed = pool.submit(_attempt, writer.flush)
                records = record_files(staging, ranks)
                ranks.raise_on_all(flushed.result(), what)
            error = None
            if ranks.rank == 0:
                manifest = self.manifest(records, writer.fingerprints)
                error = _attempt(write_manifest, staging, manifest) or _attempt(publish, staging, target)
            ranks.raise_on_all(error, what)
        finally:
            if ranks.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
        return self.directory

    def manifest(self, records: Mapping[str, FileRecord], fingerprints: Mapping[str, int]) -> Manifest:
        """Return the manifest of the files and tensors as written."""
        in_order = {tensor.key: fingerprints[tensor.key] for file in self.files for tensor in file.tensors}
        return Manifest(kind=self.kind, files=records, fingerprints=_by_slot(in_order), state=self.state or {})

    def add_documents(self, staging: Path) -> None:
        """Write the files besides the planned ones: blobs, index, documents and companions."""
        for name, tensors in self.blobs.items():
            path = staging / name
            path.parent.mkdir(exist_ok=True)
            save_file(dict(tensors), path)
            path.chmod(staging.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
        weights = [file for file in self.files if "/" not in file.path]
        if len(weights) > 1:
            (staging / INDEX).write_text(json.dumps(index_of(weights), indent=2))
        for name, fields in self.documents.items():
            (staging / name).write_text(json.dumps(fields, indent=2))
        beside = {} if self.companions is None else copy_companions(self.companions, staging)
        check_code(self.documents.get("config.json", {}), beside, _CODE_ADVICE)


def _attempt(action: Callable[..., None], *arguments: Any) -> Exception | None:
    try:
        action(*arguments)
    except (OSError, ValueError, RuntimeError) as error:
        return error
    return None


def _describe(failure: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {error}" for rank, (error, _) in sorted(failure.failures.items()))


def _by_slot(fingerprints: Mapping[str, int]) -> dict[str, dict[str, str]]:
    result: dict[str, dict[str, str]] = {}
    for key, value in fingerprints.items():
        slot, _, name = key.partition("/")
        result.setdefault(slot, {})[name] = text(value)
    return result


def _copy(piece: Piece) -> torch.Tensor:
    return piece.values.detach().to("cpu", copy=True)
