"""A model of any adapter and size as a plain Hugging Face directory, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from polyshard.checkpoint.files import INDEX, SINGLE
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError
from polyshard.core.gather import gather_shards
from polyshard.core.weight_table import WeightEntry, WeightTable, collect_layouts, stored_parts, stored_shape

# Files that belong to a model beside its weights and config.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def save_checkpoint(
    model: nn.Module | Any,
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    config: Mapping[str, Any] | Any,
    architecture: str | None = None,
    factory: str | None = None,
    companions: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write weights, config and companions. A collective: every rank calls it.

    Tensors are gathered one at a time to the first rank, which writes to a directory beside `directory` and renames
    it at the end: a failed save leaves what was there before.

    Args:
        model: a model as its factory built it, or a training engine around one.
        directory: replaced where it exists.
        parallel_context: the context that the model was built with.
        config: fields of config.json: a mapping, a `ModelConfig`, or anything with `to_dict`.
        architecture: goes into config.json's `architectures`: the name under which a server has the model registered.
        factory: `module:attribute` of the factory, recorded in config.json for `polyshard serve`.
        companions: a directory whose tokenizer and generation files are copied.
        dtype: convert the weights; default as they are.
        max_shard_bytes: size above which weights are split over several files.
        progress: called with (tensors done, tensors in all), on the first rank.

    Returns:
        The directory.

    Raises:
        CheckpointError: the first rank could not write; raised on every rank.
    """
    target = Path(directory)
    engine = None if isinstance(model, nn.Module) else model
    table: WeightTable = collect_layouts(model) if engine is None else engine.table
    weights: Iterable[tuple[str, torch.Tensor]] = (
        ((name, p.detach()) for name, p in model.named_parameters()) if engine is None else engine.weights()
    )
    dtypes = {n: dtype or p.dtype for n, p in (model if engine is None else engine.module).named_parameters()}
    writes = all(
        rank() == 0
        for rank in (
            parallel_context.get_tensor_parallel_rank,
            parallel_context.get_data_parallel_rank,
            parallel_context.get_context_parallel_rank,
            parallel_context.get_pipeline_parallel_rank,
        )
    )
    fields = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
    if architecture is not None:
        fields["architectures"] = [architecture]
    if factory is not None:
        fields["polyshard"] = {"factory": factory}
    stored_dtypes = {str(d).removeprefix("torch.") for d in dtypes.values()}
    if len(stored_dtypes) == 1:
        fields["dtype"] = stored_dtypes.pop()
        fields.pop("torch_dtype", None)

    writer = _Writer(target, _plan(table, dtypes, max_shard_bytes)) if writes else None
    error: Exception | None = None
    try:
        if writer is not None:
            error = _attempt(writer.begin)
        for done, (name, full) in enumerate(_full_tensors(weights, table, parallel_context), start=1):
            if writer is None or error is not None or full is None:
                continue  # the other ranks are still gathering
            entry = table[name]
            for part_name, part in zip(
                entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full)
            ):
                error = error or _attempt(writer.add, part_name, part.to(dtypes[name]))
            if progress is not None:
                progress(done, len(table))
        if writer is not None and error is None:
            error = _attempt(writer.finish, fields, None if companions is None else Path(companions))
        failed = _any_rank(error is not None, parallel_context)
    finally:
        if writer is not None:
            writer.discard()
    if error is not None:
        raise CheckpointError(f"saving {target} failed, and nothing was changed: {error}") from error
    if failed:
        raise CheckpointError(f"saving {target} failed on the first rank; its error says why")
    return target


def _attempt(action: Callable[..., None], *arguments: Any) -> Exception | None:
    try:
        action(*arguments)
    except (OSError, ValueError, RuntimeError) as error:
        return error
    return None


def _full_tensors(
    weights: Iterable[tuple[str, torch.Tensor]], table: WeightTable, context: ParallelContext
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Names and full tensors, on the first data-parallel replica; None on the others."""
    axis = context.axis("tensor")
    first = context.get_data_parallel_rank() == 0
    for name, shard in weights:
        yield name, gather_shards(shard, table[name].layout, axis) if first else None


def _any_rank(flag: bool, context: ParallelContext) -> bool:
    value = torch.tensor(float(flag), device=context.device)
    for name in ("tensor", "context", "data", "pipeline"):
        collectives = context.axis(name).collectives
        if collectives is not None:
            value = collectives.all_reduce(value, "max")
    return bool(value)


def _plan(table: WeightTable, dtypes: Mapping[str, torch.dtype], limit: int) -> list[list[str]]:
    """Names of the tensors of each file, in order."""
    shards: list[list[str]] = [[]]
    used = 0
    for entry in table.values():
        for index, name in enumerate(entry.checkpoint_names):
            size = _stored_bytes(entry, index, dtypes[entry.parameter])
            if shards[-1] and used + size > limit:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
    return shards


def _stored_bytes(entry: WeightEntry, index: int, dtype: torch.dtype) -> int:
    shape = stored_shape(entry.layout, len(entry.checkpoint_names), index)
    count = 1
    for length in shape:
        count *= length
    return count * dtype.itemsize


class _Writer:
    """Collects tensors, writes each file when it is complete, and puts the directory in place at the end."""

    def __init__(self, target: Path, plan: list[list[str]]) -> None:
        self.target = target
        self.temporary = target.parent / f".{target.name}.saving-{os.getpid()}"
        self.plan = plan
        self.held: dict[str, torch.Tensor] = {}
        self.file_index = 0
        self.total_bytes = 0

    def begin(self) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.held[name] = tensor.cpu().contiguous()
        self.total_bytes += tensor.nbytes
        if set(self.plan[self.file_index]) <= set(self.held):
            self._write_file()

    def finish(self, fields: Mapping[str, Any], companions: Path | None) -> None:
        assert not self.held, f"tensors were left over: {sorted(self.held)}"
        if len(self.plan) > 1:
            weight_map = {name: self._file_name(i) for i, names in enumerate(self.plan) for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.temporary / INDEX).write_text(json.dumps(index, indent=2))
        (self.temporary / "config.json").write_text(json.dumps(fields, indent=2))
        if companions is not None:
            for pattern in COMPANIONS:
                for source in companions.glob(pattern):
                    shutil.copyfile(source, self.temporary / source.name)
        for path in (*self.temporary.iterdir(), self.temporary):
            _sync(path)
        previous = self.target.parent / f".{self.target.name}.replaced-{os.getpid()}"
        if self.target.exists():
            os.rename(self.target, previous)
        os.rename(self.temporary, self.target)
        _sync(self.target.parent)
        shutil.rmtree(previous, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _file_name(self, index: int) -> str:
        return SINGLE if len(self.plan) == 1 else f"model-{index + 1:05d}-of-{len(self.plan):05d}.safetensors"

    def _write_file(self) -> None:
        names = self.plan[self.file_index]
        tensors = {name: self.held.pop(name) for name in names}
        path = self.temporary / self._file_name(self.file_index)
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(self.temporary.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
        self.file_index += 1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
