"""Hugging Face directories: safetensors, or pickles (`.bin`) if the user allows them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.checkpoint.config import read_config
from polyshard.checkpoint.directory import find
from polyshard.checkpoint.files import TensorReader
from polyshard.config.file import check_complete
from polyshard.convert.format import Foreign, Independent, Options, lazy
from polyshard.convert.pickles import load_pickle
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.bin$")


class HuggingFaceFormat:
    """`model*.safetensors` and `config.json`, which includes polyshard's checkpoints and training states."""

    name = "huggingface"
    writes = True

    def detect(self, path: Path) -> str | None:
        """Detect the format by file names."""
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        return f"a Hugging Face directory, {len(files)} safetensors files" if files else None

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the tensors unchanged, one at a time."""
        _refuse_adapter(path)
        reader = TensorReader(path)
        notes: list[str] = []
        for file in sorted(set(path.glob("*.safetensors")) - set(reader.where.values())):
            if not file.name.startswith("consolidated"):  # Mistral's: the same weights in its own format
                raise CheckpointError(
                    f"{file} is not part of the model: got a file of weights that is missing from the index. Move "
                    "it out of the directory, or add its tensors to the index."
                )
            notes.append(f"left out {file.name}: weights in another format, which are not in the index")
        left = [file.name for pattern in ("*.bin", "*.pth", "*.gguf") for file in sorted(path.glob(pattern))]
        if left:
            notes.append(f"left out {', '.join(left)}: the safetensors files are read instead")
        tensors = {
            name: LazyTensor(reader.shape(name), reader.dtype(name), partial(reader.tensor, name))
            for name in reader.where
        }
        return Foreign(tensors=tensors, config=_config(path, options), companions=find(path), notes=tuple(notes))

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `AssertionError`: `convert` itself writes this format, tensor by tensor."""
        raise AssertionError

    def independent(self, path: Path, options: Options) -> Independent:
        """Return transformers' own loading."""
        return Independent(by="transformers", directory=path)


class HuggingFaceBinFormat:
    """`pytorch_model*.bin` and `config.json`."""

    name = "huggingface-bin"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Detect the format by file names."""
        files = sorted(path.glob("pytorch_model*.bin")) if path.is_dir() else []
        return f"a Hugging Face directory, {len(files)} pickles" if files else None

    def read(self, path: Path, options: Options) -> Foreign:
        """Read the tensors with `weights_only=True`."""
        _refuse_adapter(path)
        tensors: dict[str, LazyTensor] = {}
        files = self._files(path)
        others = sorted(file.name for file in set(path.glob("pytorch_model*.bin")) - set(files))
        if others:
            raise CheckpointError(
                f"{path / others[0]} is not part of the model: got a file that is missing from the index. Move it out "
                "of the directory, or add its tensors to the index."
            )
        for file in files:
            content = load_pickle(file, options)
            for name, tensor in content.items():
                if not isinstance(tensor, torch.Tensor):
                    raise CheckpointError(f"{file}: got a {type(tensor).__name__} as {name}, expected a tensor")
                if name in tensors:
                    raise CheckpointError(f"tensor {name!r} is in two files of {path}")
                tensors[name] = lazy(tensor)
        self._check_index(path, set(tensors))
        return Foreign(tensors=tensors, config=_config(path, options), companions=path)

    def write(self, foreign: Foreign, path: Path, options: Options) -> tuple[str, ...]:
        """Raise `CheckpointError`: pickles are read only."""
        raise CheckpointError("pickles cannot be written. Write huggingface (safetensors) instead.")

    def independent(self, path: Path, options: Options) -> Independent:
        """Return transformers' own loading."""
        return Independent(by="transformers", directory=path)

    def _check_index(self, path: Path, held: set[str]) -> None:
        index = path / BIN_INDEX
        named = set(json.loads(index.read_text())["weight_map"]) if index.is_file() else held
        if named != held:
            differing = sorted(named ^ held)
            raise CheckpointError(f"{index} and its files disagree on {len(differing)} tensors, such as {differing[0]}")

    def _files(self, path: Path) -> list[Path]:
        index = path / BIN_INDEX
        if not index.is_file():
            return self._without_index(path)
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if "/" in name or "\\" in name]
        missing = [name for name in names if not (path / name).is_file()]
        if outside or missing:
            raise CheckpointError(f"{index} names {(outside or missing)[0]!r}, which is not in its directory")
        return [path / name for name in names]

    def _without_index(self, path: Path) -> list[Path]:
        if (path / BIN).is_file():
            return [path / BIN]
        files = sorted(path.glob("pytorch_model*.bin"))
        counts = {int(match[2]) for file in files if (match := _SHARD.search(file.name))}
        if counts != {len(files)}:
            raise CheckpointError(
                f"{path} is incomplete: got {len(files)} of {max(counts, default=1)} files pytorch_model*.bin. Copy "
                f"all of them, and {BIN_INDEX}."
            )
        return files


def _config(path: Path, options: Options) -> Mapping[str, Any]:
    """Return the directory's own configuration, which that of the user must not contradict."""
    if options.config is not None:
        return options.need_config("Hugging Face", find(path))
    fields = read_config(path).to_dict()
    check_complete(fields, find(path) / "config.json")
    return fields


def _refuse_adapter(path: Path) -> None:
    if (path / ADAPTER).is_file():
        raise CheckpointError(
            f"{path} holds an adapter: got {ADAPTER}, which transformers applies to the model when it loads it. Merge "
            "the adapter into the model first (peft's merge_and_unload), or move its files out."
        )
