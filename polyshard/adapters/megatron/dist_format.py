"""Megatron-Core's `torch_dist` checkpoints: torch's distributed checkpoint, with the layers stacked."""

from __future__ import annotations

import json
import math
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, save

from polyshard.adapters.megatron.names import Source, from_hugging_face, to_hugging_face
from polyshard.adapters.shared.distributed_checkpoint import stored_tensors
from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import Foreign, LazyTensor, Options, Shape

METADATA = "metadata.json"
_LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
LATEST = "latest_checkpointed_iteration.txt"


class MegatronDistFormat:
    """`iter_NNNNNNN/` with `.metadata`, `__R_N.distcp`, `common.pt` and `metadata.json`."""

    name = "megatron-torch-dist"
    writes = True

    def detect(self, path: Path) -> str | None:
        """By `metadata.json`."""
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
        """A GPT's weights; the optimizer's and random states are passed over."""
        place = iteration(path)
        config = options.need_config("Megatron's")
        stored = _stored(place, options)
        source = Source(lambda layer, name: _layer(stored, layer, name), stored.get)
        tensors = to_hugging_face(source, Shape.of(config))
        left = sorted(name for name in stored if "optimizer" in name)
        notes = (f"passed over {len(left)} tensors of the optimizer",) if left else ()
        return Foreign(tensors=tensors, config=config, notes=notes)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """A GPT's weights as Megatron's own saving lays them out; the format's index and files are torch's pickles."""
        assert foreign.config is not None
        shape = Shape.of(foreign.config)
        multiple = math.lcm(max(1, options.padded_vocabulary), options.tensor_parallel)
        padded = -(-shape.vocabulary // multiple) * multiple
        place = path / "iter_0000000"
        place.mkdir()
        content: dict[str, Any] = dict(from_hugging_face(foreign.tensors, shape, padded))
        for layer in range(shape.layers):
            for name in _LINEAR:  # Megatron's loading asks for each linear layer's empty extra state
                content[f"decoder.layers.{name}._extra_state/shard_{layer}_{shape.layers}"] = [None]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as meant, in one process
            planner = DefaultSavePlanner(flatten_state_dict=False)
            save(content, checkpoint_id=place, planner=planner, no_dist=True)
        torch.save({"iteration": 0, "checkpoint_version": 3.0}, place / "common.pt")
        (place / METADATA).write_text(
            json.dumps(
                {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
                | {"common_backend_version": 1}
            )
        )
        (path / LATEST).write_text("0")


def iteration(path: Path) -> Path:
    """The directory of the newest iteration, or the path where it is one already."""
    latest = path / LATEST
    if latest.is_file():
        text = latest.read_text().strip()
        place = path / ("release" if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else text)
        if not place.is_dir():
            raise CheckpointError(f"{latest} names iteration {text}, but {place} does not exist")
        return place
    return path


def _stored(place: Path, options: Options) -> dict[str, LazyTensor]:
    found = stored_tensors(place, options)

    @lru_cache(maxsize=1)  # layers are asked for in turn
    def load(name: str) -> torch.Tensor:
        return found[name].load()

    def held(name: str) -> LazyTensor:
        entry = found[name]
        return LazyTensor(entry.shape, entry.dtype, lambda: load(name))

    names = {name.removeprefix("model."): name for name in found if "_extra_state" not in name}
    return {short: held(name) for short, name in names.items()}


def _layer(stored: dict[str, LazyTensor], layer: int, name: str) -> LazyTensor | None:
    alone = stored.get(f"decoder.layers.{layer}.{name}")
    stacked = stored.get(f"decoder.layers.{name}")
    if alone is not None or stacked is None:
        return alone
    if layer >= stacked.shape[0]:
        return None
    return LazyTensor(stacked.shape[1:], stacked.dtype, lambda: stacked.load()[layer])
