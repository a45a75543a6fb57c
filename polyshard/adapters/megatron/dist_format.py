"""Megatron-Core's `torch_dist` checkpoints: torch's distributed checkpoint, with the layers stacked."""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, save

from polyshard.adapters.megatron.arguments import arguments_of, check_arguments, padded_rows, plain_arguments
from polyshard.adapters.megatron.expert_arguments import capacity_note
from polyshard.adapters.megatron.expert_names import COUNTERS, expert_notes, unstacked
from polyshard.adapters.megatron.latent import latent_notes
from polyshard.adapters.megatron.names import (
    LAYERS,
    from_hugging_face,
    has_equal_layers,
    linear_layers,
    padding_note,
    to_hugging_face,
)
from polyshard.adapters.megatron.reference_logits import independent
from polyshard.adapters.shared.distributed_checkpoint import stored_tensors
from polyshard.config.decoder_spec import DecoderSpec
from polyshard.convert.format import Foreign, Independent, Options
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

METADATA = "metadata.json"
COMMON = "common.pt"
LATEST = "latest_checkpointed_iteration.txt"
TRAINING_STATE = re.compile(r"^(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state_machine)(\.|/|_|$)")
NO_ARGUMENTS = (
    "the checkpoint holds no arguments of Megatron: rotary embedding, norm epsilon, activation and windows are those "
    "of the configuration, unchecked"
)


class MegatronDistFormat:
    """`iter_NNNNNNN/` with `.metadata`, `__R_N.distcp`, `common.pt` and `metadata.json`."""

    name = "megatron-torch-dist"
    writes = True

    def detect(self, path: Path) -> str | None:
        """Detect the backend `torch_dist` in `metadata.json`."""
        place = iteration(path)
        file = place / METADATA
        if not file.is_file() or not (place / ".metadata").is_file():
            return None
        try:
            backend = json.loads(file.read_text()).get("sharded_backend")
        except ValueError:
            return None
        return f"Megatron-Core's torch_dist checkpoint, {place.name}" if backend == "torch_dist" else None

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the weights of a GPT; optimizer and random state are skipped."""
        place = iteration(path)
        config = options.need_config("Megatron's", place, path)
        spec = DecoderSpec.of(config, experts=True)
        held, left = _weights(place, options)
        arguments = stored_arguments(place, options)
        check_arguments(path, arguments, spec)
        tensors = to_hugging_face(path, held, spec, padded_rows(arguments, spec, options.padded_vocabulary))
        notes = (f"left out {len(left)} tensors of the training state, such as {left[0]}",) if left else ()
        notes += padding_note(held, spec) + expert_notes(held, spec) + capacity_note(arguments) + latent_notes(spec)
        notes += () if arguments else (NO_ARGUMENTS,)
        return Foreign(tensors=tensors, config=config, companions=path, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Write a GPT's weights and arguments in the layout of Megatron's own saving; the files are torch's pickles."""
        assert foreign.config is not None
        spec = DecoderSpec.of(foreign.config, experts=True)
        multiple = math.lcm(max(1, options.padded_vocabulary), options.tensor_parallel)
        padded = -(-spec.vocabulary // multiple) * multiple
        arguments = arguments_of(spec, foreign.config, padded, max(1, options.padded_vocabulary))
        place = path / "iter_0000000"
        place.mkdir()
        content: dict[str, Any] = dict(from_hugging_face(foreign.tensors, spec, padded))
        # Megatron's loading requires an empty extra state of each linear layer.
        content |= {f"{LAYERS}{name}": [None] for name in _extra_states(spec)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # expected in one process
            planner = DefaultSavePlanner(flatten_state_dict=False)
            save(content, checkpoint_id=place, planner=planner, no_dist=True)
        arguments["tensor_model_parallel_size"] = options.tensor_parallel
        common = {"iteration": 0, "checkpoint_version": 3.0, "args": argparse.Namespace(**arguments)}
        torch.save(common, place / COMMON)
        (place / METADATA).write_text(
            json.dumps(
                {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
                | {"common_backend_version": 1}
            )
        )
        (path / LATEST).write_text("0")
        kept = "fields of the configuration without an argument of Megatron are in config.json beside the checkpoint"
        return (kept, *latent_notes(spec))

    def independent(self, path: Path, options: Options) -> Independent:
        """Return Megatron-Core's own GPT, loaded by its own code."""
        place = iteration(path)
        return independent(
            place, "torch_dist", options.need_config("Megatron's", place, path), stored_arguments(place, options)
        )


def _extra_states(spec: DecoderSpec) -> Iterator[str]:
    """Yield the names of the linear layers' extra states, which count layers and experts if these are stacked."""
    equal = has_equal_layers(spec)
    for layer in range(spec.layers):
        place, shard = ("", f"{layer}_{spec.layers}") if equal else (f"{layer}.", "0_1")
        for name in linear_layers(spec, layer):
            yield f"{place}{name}._extra_state/shard_{shard}"
        if spec.experts is None or not spec.experts.sparse[layer]:
            continue
        count = spec.experts.count
        for expert in range(count):
            shard = f"{layer}.{expert}_{spec.layers}.{count}" if equal else f"{expert}_{count}"
            for number in (1, 2):
                yield f"{place}mlp.experts.experts.linear_fc{number}._extra_state/shard_{shard}"


def iteration(path: Path) -> Path:
    """Return the directory of the newest iteration, or the path itself if it is one."""
    latest = path / LATEST
    if latest.is_file():
        text = latest.read_text().strip()
        place = path / ("release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else text)
        if not place.is_dir():
            raise CheckpointError(
                f"{latest} names iteration {text}, but {place} does not exist. Copy the full checkpoint"
            )
        return place
    return path


def stored_arguments(place: Path, options: Options) -> dict[str, Any]:
    """Return the arguments that Megatron's training saved; empty if there are none."""
    file = place / COMMON
    content = load_pickle(file, options) if file.is_file() else {}
    arguments = content.get("args") if isinstance(content, dict) else None
    return plain_arguments(arguments)


def _weights(place: Path, options: Options) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the weights, unstacked by layer, and the names of the training state."""
    found = stored_tensors(place, options)

    @lru_cache(maxsize=1)  # the layers of a stacked tensor are read one after the other
    def load(name: str) -> torch.Tensor:
        return found[name].load()

    held: dict[str, LazyTensor] = {}
    left: list[str] = []
    for name, entry in found.items():
        short = name.removeprefix("model.")
        if TRAINING_STATE.search(short) or COUNTERS.search(short):
            left.append(name)
        elif "_extra_state" in short:
            continue
        elif short.startswith(LAYERS) and not short.removeprefix(LAYERS)[0].isdigit():
            for layer in range(entry.shape[0]):
                part = LazyTensor(entry.shape[1:], entry.dtype, lambda name=name, layer=layer: load(name)[layer])
                held.update(unstacked(f"{LAYERS}{layer}.{short.removeprefix(LAYERS)}", part))
        else:
            held.update(unstacked(short, LazyTensor(entry.shape, entry.dtype, lambda name=name: load(name))))
    return held, sorted(left)
