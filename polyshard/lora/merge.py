"""A Hugging Face checkpoint of a model with its LoRA adapter merged into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.checkpoint.location import as_path
from polyshard.checkpoint.part import part_of
from polyshard.checkpoint.pending import PendingSave
from polyshard.checkpoint.save import MAX_SHARD_BYTES, SaveJob, check_stored_dtype, model_documents, weight_files
from polyshard.checkpoint.storage import Progress
from polyshard.core.context import ParallelContext
from polyshard.core.pieces import Piece
from polyshard.core.serving import RegisteredModel
from polyshard.lora.add import lora_layers
from polyshard.lora.layer import LoraLinear
from polyshard.weights.view import WeightView, view_weights


def save_merged_lora(
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
    """Write `W + scale * B A` for each layer with LoRA matrices, and all other weights, as a Hugging Face directory.

    The model is not changed. This is a collective: every rank must call it. The sums are computed in float32 or wider,
    and need memory for a copy of the weights that this rank holds.

    Args:
        model: a model with an adapter, or the training engine around one.
        directory: this and the other arguments are those of `save_checkpoint`.

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
        >>> sorted(path.name for path in save_merged_lora(model, "merged", context, config={}).iterdir())
        ['config.json', 'model.safetensors', 'polyshard.json']
    """
    check_stored_dtype(dtype)
    view = view_weights(model, parallel_context)
    layers = lora_layers(view.module)
    part = part_of(view.module)
    assert part is not None, "add_lora attaches it"
    table = part.rest(view.table)
    matrices = {name: shard.detach().clone() for name, shard in view.shards() if name in part.parameters}
    dtypes = {name: dtype or held for name, held in view.dtypes.items() if name in table}
    job = SaveJob(
        directory=as_path(directory),
        kind="weights",
        pieces=_merged(view, layers, matrices, set(table)),
        table=table,
        files=weight_files(table, dtypes, max_shard_bytes),
        documents=model_documents(config, architecture, factory, dtypes, getattr(view.module, "architecture", None)),
        companions=None if companions is None else as_path(companions),
    )
    return job.start(parallel_context, asynchronous, progress)


def _merged(
    view: WeightView, layers: Mapping[str, LoraLinear], matrices: Mapping[str, torch.Tensor], frozen: set[str]
) -> list[Piece]:
    """Return this rank's pieces of the frozen weights, with the product of the matrices added."""
    pieces: list[Piece] = []
    for piece in view.owned_pieces():
        if piece.parameter not in frozen:
            continue
        path, inside, leaf = piece.parameter.partition(".base_layer.")
        if inside and path in layers and leaf.rpartition(".")[2] == "weight":
            added = layers[path].product(
                {
                    name.removeprefix(f"{path}."): value
                    for name, value in matrices.items()
                    if name.startswith(f"{path}.")
                }
            )
            run = added.reshape(-1)[piece.start : piece.start + len(piece.values)]
            wide = torch.promote_types(piece.values.dtype, run.dtype)
            merged = piece.values.to(wide) + run.to(device=piece.values.device, dtype=wide)
            piece = replace(piece, values=merged.to(piece.values.dtype))
        pieces.append(piece)
    return pieces
