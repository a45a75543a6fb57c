"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, with Hugging Face's names."""

from __future__ import annotations

import json
import logging
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.checkpoint.directory import find
from polyshard.checkpoint.files import TensorReader
from polyshard.checkpoint.load import check_fit, read_pieces
from polyshard.checkpoint.location import as_path, is_remote
from polyshard.checkpoint.manifest import Manifest, read_manifest, verify_files
from polyshard.checkpoint.part import StoredPart, part_of
from polyshard.checkpoint.pending import PendingSave
from polyshard.checkpoint.save import SaveJob, check_stored_dtype, stored_tensors
from polyshard.checkpoint.storage import Progress
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError, ConfigurationError
from polyshard.core.ranks import Ranks
from polyshard.lora.add import DOCUMENT, lora_layers
from polyshard.lora.config import check_config, rank_and_scale
from polyshard.weights.view import view_weights

logger = logging.getLogger(__name__)

KIND = "lora"


def save_lora(
    model: nn.Module | Any,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    base_model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    asynchronous: bool = False,
    progress: Progress | None = None,
) -> Path | PendingSave:
    """Write a model's LoRA adapter as PEFT does, for PEFT, transformers and vLLM.

    This is a collective: every rank must call it. Full matrices are written from their shards without gathering, and
    atomically, as by `save_checkpoint`.

    Args:
        model: a model with an adapter, or the training engine around one.
        directory: the target. A checkpoint there is replaced; other files are kept.
        parallel_context: the context that the model was built with.
        base_model: `base_model_name_or_path` of the file; by default that of the config.
        dtype: dtype to store; by default that of each matrix.
        asynchronous: copy the matrices, write them in the background, and return a `PendingSave`.
        progress: called with (elements written, total elements) of this rank.

    Returns:
        The directory, or the pending save.

    Raises:
        ConfigurationError: the model has no adapter.
        CheckpointError: a rank could not write; raised on every rank, naming the rank.

    Examples:
        >>> from peft import LoraConfig
        >>> context = ps.initialize("torch")
        >>> model = torch.nn.ModuleDict({"up_proj": ps.column_parallel(4, 8, context)})
        >>> model = ps.add_lora(model, LoraConfig(r=2, target_modules=["up_proj"]), context)
        >>> sorted(path.name for path in save_lora(model, "adapter", context).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'polyshard.json']
    """
    if base_model is not None and not isinstance(base_model, (str, PathLike)):
        raise ConfigurationError(f"base_model is invalid: got {base_model!r}, expected a name or a directory.")
    check_stored_dtype(dtype)
    view = view_weights(model, parallel_context)
    part = lora_part_of(view.module)
    table = part.table(view.table)
    dtypes = {name: dtype or held for name, held in view.dtypes.items()}
    documents = {name: dict(fields) for name, fields in part.documents().items()}
    if base_model is not None:
        documents[DOCUMENT]["base_model_name_or_path"] = str(base_model)
    job = SaveJob(
        directory=as_path(directory),
        kind=KIND,
        pieces=[piece for piece in view.owned_pieces() if piece.parameter in table],
        table=table,
        files=[part.file(stored_tensors(table, dtypes))],
        documents=documents,
    )
    return job.start(parallel_context, asynchronous, progress)


def load_lora(
    model: nn.Module | Any,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> None:
    """Load an adapter that PEFT or `save_lora` wrote into a model's LoRA matrices, at any tensor-parallel size.

    This is a collective: every rank must call it. If the adapter does not match the model, nothing is changed.

    Args:
        model: a model after `add_lora`, with the same ranks and scaling, or the training engine around one. To take
            them from the directory, pass `peft.LoraConfig.from_pretrained(directory, inference_mode=False)` to
            `add_lora`.
        directory: an adapter's directory or its URL, or a training state of a model with an adapter.
        parallel_context: the context that the model was built with.
        verify: compare each file's checksum with the manifest, if there is one.
        progress: called with (elements read, total elements) of this rank.

    Raises:
        ConfigurationError: the model has no adapter.
        CheckpointError: files are missing or altered; tensors are missing, unexpected, or have the wrong shape; or the
            adapter has another scaling.

    Examples:
        >>> from peft import LoraConfig
        >>> context = ps.initialize("torch")
        >>> config = LoraConfig(r=2, target_modules=["up_proj"])
        >>> models = [torch.nn.ModuleDict({"up_proj": ps.column_parallel(4, 8, context)}) for _ in range(2)]
        >>> first, second = (ps.add_lora(model, config, context, seed=i) for i, model in enumerate(models))
        >>> load_lora(second, ps.save_lora(first, "adapter", context), context)
        >>> torch.equal(second["up_proj"].lora_A["up_proj"].weight, first["up_proj"].lora_A["up_proj"].weight)
        True
    """
    path, ranks = find(directory), Ranks.of(parallel_context)
    view = view_weights(model, parallel_context, written=True)
    part = lora_part_of(view.module)
    table = part.table(view.table)

    def opened() -> tuple[Manifest | None, TensorReader]:
        if not (path / DOCUMENT).is_file():
            raise CheckpointError(f"{path} holds no LoRA adapter: {DOCUMENT} is missing.")
        _check_scaling(view.module, path)
        reader = part.reader(path)
        check_fit(table, reader, ())
        return read_manifest(path), reader

    manifest, reader = ranks.run_on_all(opened, f"{path} cannot be loaded; nothing was changed")
    if manifest is not None and verify:
        verify_files(path, manifest, ranks)
    axis = parallel_context.axis("tensor")
    pieces = [piece for piece in view.pieces() if piece.parameter in table]
    read_pieces(reader, pieces, table, axis.rank, axis.size, progress)
    view.written(pieces)
    if view.has_masters:
        masters = [piece for piece in view.masters() if piece.parameter in table]
        read_pieces(reader, masters, table, axis.rank, axis.size, progress)
        view.masters_written()


def lora_part_of(module: nn.Module) -> StoredPart:
    """Return the part of a model that is its adapter.

    Raises:
        ConfigurationError: the model has no adapter.
    """
    lora_layers(module)  # raises if there are none
    part = part_of(module)
    if part is None:
        raise ConfigurationError(
            f"{type(module).__name__} contains a model with a LoRA adapter. Pass the model that add_lora returned."
        )
    return part


def _check_scaling(module: nn.Module, path: Path) -> None:
    """Raise `CheckpointError` if an adapter's matrices have another factor than the model's."""
    try:
        config = _stored_config(path)
        check_config(config)
    except (ConfigurationError, TypeError, ValueError, json.JSONDecodeError) as problem:
        raise CheckpointError(f"{path / DOCUMENT} is unsupported: {problem}") from problem
    other = [
        f"{part.name}: got {scale:g}, expected {part.scale:g}"
        for layer in lora_layers(module).values()
        for part in layer.parts
        if (scale := rank_and_scale(config, part.name)[1]) != part.scale
    ]
    if other:
        raise CheckpointError(
            f"{path} has another scaling than the model ({len(other)} projections): {other[0]}. Pass the same r, "
            "lora_alpha and use_rslora to add_lora."
        )


def _stored_config(path: Path) -> Any:
    """Return the `peft.LoraConfig` of an adapter's directory, as PEFT reads it from a local file."""
    from peft import LoraConfig

    if not is_remote(path):
        return LoraConfig.from_pretrained(str(path))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, DOCUMENT).write_bytes((path / DOCUMENT).read_bytes())
        return LoraConfig.from_pretrained(folder)
