"""Megatron's legacy checkpoints: `iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, with each rank's shards.

TT is the tensor rank, PPP the pipeline stage and EEE the expert rank. One number after TT may be either.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from polyshard.adapters.megatron.arguments import check_arguments, padded_rows, plain_arguments
from polyshard.adapters.megatron.dist_format import NO_ARGUMENTS, iteration
from polyshard.adapters.megatron.expert_arguments import capacity_note
from polyshard.adapters.megatron.expert_names import (
    COUNTERS,
    canonical,
    expert_notes,
    is_grouped,
    local_expert,
    one_by_one,
)
from polyshard.adapters.megatron.latent import latent_notes
from polyshard.adapters.megatron.names import LAYERS, padding_note, to_hugging_face
from polyshard.adapters.megatron.reference_logits import independent
from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert.format import Foreign, Independent, NotComparableError, Options
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

_FOLDER = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(?:_(\d\d\d))?$")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")
_FILES = ("model_optim_rng.pt", "model_rng.pt")

# The dimension sharded over tensor ranks, by the end of the name; norms and biases of row layers are replicated.
_DIMENSIONS = {
    "word_embeddings.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "linear_q_proj.weight": 0,
    "linear_q_up_proj.weight": 0,
    "linear_kv_up_proj.weight": 0,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
    "output_layer.weight": 0,
}

# Projections to latents: local layers shard their rows, Transformer Engine has all of them on each rank.
_SHARDED_OR_NOT = ("linear_q_down_proj.weight", "linear_kv_down_proj.weight")

# On the first and on the last stage: ranks that hold both are no pipeline.
_FIRST, _LAST = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"

Place = tuple[int, int, int]  # pipeline stage, expert rank and tensor rank
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
        pipeline, expert, tensor = _sizes(found)
        experts = f", expert-parallel {expert}" if expert > 1 else ""
        return (
            f"Megatron's legacy checkpoint, {place.name}, tensor-parallel {tensor}, pipeline-parallel {pipeline}"
            f"{experts}"
        )

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the weights, joined over all ranks."""
        place = iteration(path)
        config = options.need_config("Megatron's", place, path)
        spec = DecoderSpec.of(config, experts=True)
        files = {where: load_pickle(file, options) for where, file in _complete(place).items()}
        files = _as_experts(files)
        arguments = _arguments(files[0, 0, 0])
        check_arguments(path, arguments, spec)
        _check_sizes(place, files, arguments)
        held: dict[str, LazyTensor] = {}
        first = 0  # first layer of the chunk
        _, expert_size, tensor = _sizes(files)
        for stage, chunk in _chunks(files):
            states = [
                [one_by_one(_model(files[stage, expert, rank], chunk), spec, expert_size) for rank in range(tensor)]
                for expert in range(expert_size)
            ]
            first += _add(held, place, states, first)
        rows = padded_rows(arguments, spec, options.padded_vocabulary)
        tensors = to_hugging_face(path, held, spec, rows)
        notes = padding_note(held, spec) + expert_notes(held, spec) + capacity_note(arguments) + latent_notes(spec)
        notes += () if arguments else (NO_ARGUMENTS,)
        left = sorted({key for content in files.values() for key in content if not key.startswith("model")})
        counters = {name for state in _models(files) for name in state if COUNTERS.search(name)}
        left += ["the routers' counts of tokens"] * bool(counters)
        if left and "model" in files[0, 0, 0]:
            notes += (f"left out the training state: {', '.join(left)}",)
        return Foreign(tensors=tensors, config=config, companions=path, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `CheckpointError`: this format is only read."""
        raise CheckpointError("Megatron's legacy format is read, not written: write megatron-torch-dist instead")

    def independent(self, path: Path, options: Options) -> Independent:
        """Return Megatron-Core's own GPT, loaded by its own code."""
        place = iteration(path)
        files = _complete(place)
        content = load_pickle(files[0, 0, 0], options)
        if any(is_grouped(name) for name in _model(content, "model")):
            raise NotComparableError("Megatron-Core's GroupedMLP computes on CUDA only")
        arguments = _arguments(content)
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
            found[int(match[2] or 0), int(match[3] or 0), int(match[1])] = file
    return found


def _sizes(places: Iterable[Place]) -> tuple[int, int, int]:
    """Return the numbers of pipeline stages, expert ranks and tensor ranks."""
    stages, experts, tensor = zip(*places)
    return max(stages) + 1, max(experts) + 1, max(tensor) + 1


def _as_experts(files: Mapping[Place, Any]) -> Mapping[Place, Any]:
    """Return the files with stages as expert ranks if each of them has the first and the last layers of the model.

    `mp_rank_TT_NNN` is of a pipeline, or of expert parallel without one.
    """
    stages, experts, _ = _sizes(files)
    names = ({name.removeprefix("module.") for name in _model(content, "model")} for content in files.values())
    if stages == 1 or experts > 1 or not all({_FIRST, _LAST} <= held for held in names):
        return files
    return {(0, stage, rank): content for (stage, _, rank), content in files.items()}


def _complete(place: Path) -> dict[Place, Path]:
    """Return the files of all ranks.

    Raises:
        CheckpointError: a folder is unsupported, or ranks are missing.
    """
    files = _files(place)
    others = sorted({folder.name for folder in _folders(place)} - {file.parent.name for file in files.values()})
    if others:
        raise CheckpointError(
            f"{place} holds folders that cannot be read: {', '.join(others[:5])}. Expected mp_rank_TT, mp_rank_TT_PPP "
            f"or mp_rank_TT_PPP_EEE, each with {_FILES[0]}."
        )
    stages, experts, tensor = _sizes(files)
    everyone = itertools.product(range(stages), range(experts), range(tensor))
    missing = [where for where in everyone if where not in files]
    if missing:
        names = [
            f"mp_rank_{t:02d}"
            + (f"_{s:03d}" if stages > 1 or experts > 1 else "")
            + (f"_{e:03d}" if experts > 1 else "")
            for s, e, t in missing
        ]
        raise CheckpointError(f"{place} is incomplete: {', '.join(names[:5])} missing. Copy all ranks.")
    return files


def _check_sizes(place: Path, files: Mapping[Place, Any], arguments: Mapping[str, Any]) -> None:
    stages, experts, tensor = _sizes(files)
    for name, found in (
        ("tensor_model_parallel_size", tensor),
        ("pipeline_model_parallel_size", stages),
        ("expert_model_parallel_size", experts),
        ("expert_tensor_parallel_size", tensor),
    ):
        if (stored := arguments.get(name)) is not None and stored != found:
            raise CheckpointError(
                f"{place} is incomplete: its arguments say {name}={stored}, got {found} ranks. Copy all ranks."
            )


def _chunks(files: Mapping[Place, Any]) -> list[tuple[int, str]]:
    """Return the stage and key of each pipeline chunk, in the order of the layers."""
    keys = sorted((key for key in files[0, 0, 0] if re.fullmatch(r"model\d+", key)), key=lambda key: int(key[5:]))
    stages = range(_sizes(files)[0])
    return [(stage, key) for key in keys or ["model"] for stage in stages]


def _model(content: Mapping[str, Any], key: str) -> State:
    return content.get(key, content) if key == "model" else content[key]


def _models(files: Mapping[Place, Any]) -> Iterator[State]:
    """Yield the tensors of each file and chunk."""
    for (_, key), content in itertools.product(_chunks(files), files.values()):
        yield _model(content, key)


def _add(held: dict[str, LazyTensor], place: Path, ranks: list[list[State]], first: int) -> int:
    """Add the joined tensors of one chunk; return its number of layers.

    Args:
        held: the tensors so far, by canonical name.
        place: the checkpoint, for errors.
        ranks: the tensors of each expert rank and tensor rank.
        first: number of the chunk's first layer.
    """
    layers: set[int] = set()
    parts = [_of_expert_rank(place, states) for states in ranks]
    per_rank = _experts_of_a_rank(place, parts)
    for expert_rank, named in enumerate(parts):
        for name in sorted(named):
            short, layer = name.removeprefix("module."), _LAYER.match(name.removeprefix("module."))
            if layer:
                layers.add(int(layer[1]))
                rest = layer[2]
                if expert := local_expert(rest):
                    rest = canonical(expert_rank * per_rank + expert[0], expert[1])
                short = f"{LAYERS}{first + int(layer[1])}.{rest}"
            part = _joined(place, named[name], short)
            if short not in held:
                held[short] = part
            elif not torch.equal(held[short].load(), part.load()):  # a tied embedding, or replicated by expert ranks
                raise CheckpointError(
                    f"{place}: {name} is on two stages or expert ranks with different values, expected equal ones. "
                    "Find out which is right."
                )
    return len(layers)


def _of_expert_rank(place: Path, states: list[State]) -> dict[str, list[torch.Tensor]]:
    """Return the parts of each tensor on all tensor ranks."""
    names = {name for state in states for name, value in state.items() if isinstance(value, torch.Tensor)}
    found: dict[str, list[torch.Tensor]] = {}
    for name in names:
        if name.endswith("_extra_state") or COUNTERS.search(name):
            continue
        lacking = [index for index, state in enumerate(states) if name not in state]
        if lacking:
            raise CheckpointError(f"{place}: {name} is missing on tensor rank {lacking[0]}. Copy all ranks.")
        found[name] = [state[name] for state in states]
    return found


def _experts_of_a_rank(place: Path, parts: list[dict[str, list[torch.Tensor]]]) -> int:
    """Return the number of experts that each expert rank has in a layer."""
    counts = [max((e[0] + 1 for name in named if (e := local_expert(name))), default=0) for named in parts]
    if len(set(counts)) > 1:
        raise CheckpointError(f"{place}: the expert ranks hold {counts} experts in a layer, expected equal numbers.")
    return counts[0]


def _joined(place: Path, parts: list[torch.Tensor], name: str) -> LazyTensor:
    dim = next((d for end, d in _DIMENSIONS.items() if name.endswith(end)), None)
    if name.endswith(_SHARDED_OR_NOT) and not all(torch.equal(parts[0], part) for part in parts[1:]):
        dim = 0
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
