"""Megatron's legacy checkpoints: `iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt`, each rank's own shapes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from polyshard.adapters.megatron.dist_format import iteration
from polyshard.adapters.megatron.names import Source, to_hugging_face
from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import Foreign, LazyTensor, Options, Shape, load_pickle

_FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?$")
_FILES = ("model_optim_rng.pt", "model_rng.pt")

# Dimension that tensor ranks share, by the end of the name; norms and biases of row layers are whole.
_DIMENSIONS = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc2.weight": 1,
    "output_layer.weight": 0,
}

Ranks = dict[tuple[int, int], Mapping[str, torch.Tensor]]  # by pipeline stage and tensor rank


class MegatronLegacyFormat:
    """`mp_rank_XX`."""

    name = "megatron-legacy"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Folders by name."""
        place = iteration(path)
        found = _files(place)
        if not found:
            return None
        tensor, pipeline = max(t for _, t in found) + 1, max(p for p, _ in found) + 1
        return f"Megatron's legacy checkpoint, {place.name}, tensor-parallel {tensor}, pipeline-parallel {pipeline}"

    def read(self, path: Path, options: Options) -> Foreign:
        """The ranks' parts joined."""
        config = options.need_config("Megatron's")
        with torch.serialization.safe_globals([argparse.Namespace]):
            files = {place: load_pickle(file, options) for place, file in _files(iteration(path)).items()}
        ranks: Ranks = {place: content.get("model", content) for place, content in files.items()}
        shape = Shape.of(config)
        stages = max(stage for stage, _ in ranks) + 1
        per_stage = shape.layers // stages
        last = stages - 1

        def of_layer(layer: int, name: str) -> LazyTensor | None:
            stage, local = divmod(layer, per_stage)
            return _joined(ranks, stage, f"decoder.layers.{local}.{name}")

        def alone(name: str) -> LazyTensor | None:
            return _joined(ranks, 0 if name.startswith("embedding") else last, name)

        tensors = to_hugging_face(Source(of_layer, alone), shape)
        notes = ("passed over the optimizer's state",) if any("optimizer" in c for c in files.values()) else ()
        return Foreign(tensors=tensors, config=config, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Never."""
        raise CheckpointError("Megatron's legacy format is read, not written: write megatron-torch-dist")


def _files(place: Path) -> dict[tuple[int, int], Path]:
    found: dict[tuple[int, int], Path] = {}
    for folder in sorted(place.glob("mp_rank_*")) if place.is_dir() else []:
        match = _FOLDER.match(folder.name)
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if match and file is not None:
            found[int(match[2] or 0), int(match[1])] = file
    return found


def _joined(ranks: Ranks, stage: int, name: str) -> LazyTensor | None:
    parts = [ranks[place][name] for place in sorted(ranks) if place[0] == stage and name in ranks[place]]
    if not parts:
        return None
    dim = next((d for end, d in _DIMENSIONS.items() if name.endswith(end)), None)
    if dim is None or len(parts) == 1:
        return LazyTensor(tuple(parts[0].shape), parts[0].dtype, lambda: parts[0])
    size = list(parts[0].shape)
    size[dim] = sum(part.shape[dim] for part in parts)

    def load() -> torch.Tensor:
        if "linear_fc1" not in name:
            return torch.cat(parts, dim=dim)
        halves = [part.chunk(2) for part in parts]  # each rank holds its gate and its up
        return torch.cat([half[i] for i in range(2) for half in halves])

    return LazyTensor(tuple(size), parts[0].dtype, load)
