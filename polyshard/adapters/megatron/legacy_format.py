"""Megatron's legacy checkpoints: `iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt`, with the shards of each rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.megatron.arguments import check_arguments, padded_rows, plain_arguments
from polyshard.adapters.megatron.dist_format import NO_ARGUMENTS, iteration
from polyshard.adapters.megatron.names import LAYERS, padding_note, to_hugging_face
from polyshard.adapters.megatron.reference_logits import independent
from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert.format import Foreign, Independent, Options
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

_FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?$")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")
_FILES = ("model_optim_rng.pt", "model_rng.pt")

# The dimension sharded over tensor ranks, by the end of the name; norms and biases of row layers are replicated.
_DIMENSIONS = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
    "output_layer.weight": 0,
}

Place = tuple[int, int]  # pipeline stage and tensor rank
State = Mapping[str, torch.Tensor]


class MegatronLegacyFormat:
    """Folders `mp_rank_XX`."""

    name = "megatron-legacy"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Detect the rank folders by name."""
        place = iteration(path)
        found = _files(place)
        if not found:
            return None
        tensor, pipeline = max(t for _, t in found) + 1, max(p for p, _ in found) + 1
        return f"Megatron's legacy checkpoint, {place.name}, tensor-parallel {tensor}, pipeline-parallel {pipeline}"

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the weights, joined over all ranks."""
        place = iteration(path)
        config = options.need_config("Megatron's", place, path)
        spec = DecoderSpec.of(config)
        files = {where: load_pickle(file, options) for where, file in _complete(place).items()}
        arguments = _arguments(files[0, 0])
        check_arguments(path, arguments, spec)
        _check_sizes(place, files, arguments)
        held: dict[str, LazyTensor] = {}
        first = 0  # first layer of the chunk
        for stage, chunk in _chunks(place, files):
            tensors = sorted((rank, _model(content, chunk)) for (s, rank), content in files.items() if s == stage)
            first += _add(held, place, [state for _, state in tensors], first)
        rows = padded_rows(arguments, spec, options.padded_vocabulary)
        tensors = to_hugging_face(path, held, spec, rows)
        notes = padding_note(held, spec) + (() if arguments else (NO_ARGUMENTS,))
        left = sorted({key for content in files.values() for key in content if not key.startswith("model")})
        if left and "model" in files[0, 0]:
            notes += (f"left out the training state: {', '.join(left)}",)
        return Foreign(tensors=tensors, config=config, companions=path, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `CheckpointError`: this format is only read."""
        raise CheckpointError("Megatron's legacy format is read, not written: write megatron-torch-dist instead")

    def independent(self, path: Path, options: Options) -> Independent:
        """Return Megatron-Core's own GPT, loaded by its own code."""
        place = iteration(path)
        files = _complete(place)
        arguments = _arguments(load_pickle(files[0, 0], options))
        return independent(place, "legacy", options.need_config("Megatron's", place, path), arguments, ranks=len(files))


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    return plain_arguments(content.get("args"))


def _folders(place: Path) -> list[Path]:
    return sorted(place.glob("mp_rank_*")) if place.is_dir() else []


def _files(place: Path) -> dict[Place, Path]:
    found: dict[Place, Path] = {}
    for folder in _folders(place):
        match = _FOLDER.match(folder.name)
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if match and file is not None:
            found[int(match[2] or 0), int(match[1])] = file
    return found


def _complete(place: Path) -> dict[Place, Path]:
    """Return the files of all ranks.

    Raises:
        CheckpointError: a folder is unsupported, or ranks are missing.
    """
    files = _files(place)
    others = sorted({folder.name for folder in _folders(place)} - {file.parent.name for file in files.values()})
    if others:
        raise CheckpointError(
            f"{place} holds folders that cannot be read: {', '.join(others[:5])}. Expected mp_rank_TT or "
            f"mp_rank_TT_PPP, each with {_FILES[0]}; experts' folders (mp_rank_TT_PPP_EEE) are unsupported."
        )
    stages, tensor = max(s for s, _ in files) + 1, max(t for _, t in files) + 1
    missing = [(s, t) for s in range(stages) for t in range(tensor) if (s, t) not in files]
    if missing:
        names = [f"mp_rank_{t:02d}" + (f"_{s:03d}" if stages > 1 else "") for s, t in missing]
        raise CheckpointError(f"{place} is incomplete: {', '.join(names[:5])} missing. Copy all ranks.")
    return files


def _check_sizes(place: Path, files: Mapping[Place, Any], arguments: Mapping[str, Any]) -> None:
    for name, found in (
        ("tensor_model_parallel_size", max(t for _, t in files) + 1),
        ("pipeline_model_parallel_size", max(s for s, _ in files) + 1),
    ):
        if (stored := arguments.get(name)) is not None and stored != found:
            raise CheckpointError(
                f"{place} is incomplete: its arguments say {name}={stored}, got {found} ranks. Copy all ranks."
            )


def _chunks(place: Path, files: Mapping[Place, Any]) -> list[tuple[int, str]]:
    """Return the stage and key of each pipeline chunk, in the order of the layers."""
    keys = sorted((key for key in files[0, 0] if re.fullmatch(r"model\d+", key)), key=lambda key: int(key[5:]))
    stages = range(max(stage for stage, _ in files) + 1)
    return [(stage, key) for key in keys or ["model"] for stage in stages]


def _model(content: Mapping[str, Any], key: str) -> State:
    return content.get(key, content) if key == "model" else content[key]


def _add(held: dict[str, LazyTensor], place: Path, ranks: list[State], first: int) -> int:
    """Add the joined tensors of one chunk; return its number of layers."""
    names = {name for rank in ranks for name, value in rank.items() if isinstance(value, torch.Tensor)}
    layers: set[int] = set()
    for name in sorted(names):
        if name.endswith("_extra_state"):
            continue
        short = name.removeprefix("module.")
        match = _LAYER.match(short)
        if match:
            layers.add(int(match[1]))
            short = f"{LAYERS}{first + int(match[1])}.{match[2]}"
        lacking = [index for index, rank in enumerate(ranks) if name not in rank]
        if lacking:
            raise CheckpointError(f"{place}: {name} is missing on tensor rank {lacking[0]}. Copy all ranks.")
        part = _joined(place, [rank[name] for rank in ranks], name)
        if short in held:  # a tied embedding is on the first and on the last stage
            if not torch.equal(held[short].load(), part.load()):
                raise CheckpointError(
                    f"{place}: {name} is on two stages with different values, expected equal ones. Find out "
                    "which is right."
                )
            continue
        held[short] = part
    return len(layers)


def _joined(place: Path, parts: list[torch.Tensor], name: str) -> LazyTensor:
    dim = next((d for end, d in _DIMENSIONS.items() if name.endswith(end)), None)
    if dim is None or len(parts) == 1:
        if any(not torch.equal(parts[0], part) for part in parts[1:]):
            raise CheckpointError(
                f"{place}: {name} is replicated, but its tensor ranks disagree: got different values, expected equal "
                "ones. Find out which rank is right; training let them drift apart."
            )
        return LazyTensor(tuple(parts[0].shape), parts[0].dtype, lambda: parts[0])
    size = list(parts[0].shape)
    size[dim] = sum(part.shape[dim] for part in parts)

    def load() -> torch.Tensor:
        if "linear_fc1" not in name:
            return torch.cat(parts, dim=dim)
        halves = [part.chunk(2) for part in parts]  # each rank holds its gate and up shards
        return torch.cat([half[i] for i in range(2) for half in halves])

    return LazyTensor(tuple(size), parts[0].dtype, load)
