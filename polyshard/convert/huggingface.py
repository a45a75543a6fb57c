"""Hugging Face directories: safetensors, or pickles (`.bin`) with the user's leave."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from polyshard.checkpoint.config import read_config
from polyshard.checkpoint.files import TensorReader
from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import Foreign, LazyTensor, Options, lazy, load_pickle

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class HuggingFaceFormat:
    """`model*.safetensors` and `config.json`; a polyshard training state is one too."""

    name = "huggingface"
    writes = True

    def detect(self, path: Path) -> str | None:
        """Files by name."""
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        return f"a Hugging Face directory, {len(files)} safetensors files" if files else None

    def read(self, path: Path, options: Options) -> Foreign:
        """Tensors as they are, one at a time."""
        reader = TensorReader(path)
        tensors = {
            name: LazyTensor(reader.shape(name), reader.dtype(name), partial(reader.tensor, name))
            for name in reader.where
        }
        return Foreign(tensors=tensors, config=options.config or read_config(path).to_dict(), companions=path)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Written by `convert` itself, which streams."""
        raise AssertionError


class HuggingFaceBinFormat:
    """`pytorch_model*.bin` and `config.json`."""

    name = "huggingface-bin"
    writes = False

    def detect(self, path: Path) -> str | None:
        """Files by name."""
        files = sorted(path.glob("pytorch_model*.bin")) if path.is_dir() else []
        return f"a Hugging Face directory, {len(files)} pickles" if files else None

    def read(self, path: Path, options: Options) -> Foreign:
        """Tensors, read with `weights_only=True`."""
        tensors: dict[str, LazyTensor] = {}
        for file in self._files(path):
            content = load_pickle(file, options)
            for name, tensor in content.items():
                if not isinstance(tensor, torch.Tensor):
                    raise CheckpointError(f"{file}: {name} is a {type(tensor).__name__}, expected a tensor")
                if name in tensors:
                    raise CheckpointError(f"tensor {name!r} is in two files of {path}")
                tensors[name] = lazy(tensor)
        return Foreign(tensors=tensors, config=options.config or read_config(path).to_dict(), companions=path)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Never."""
        raise CheckpointError("pickles are not written: write huggingface, which is safetensors")

    def _files(self, path: Path) -> list[Path]:
        index = path / BIN_INDEX
        if not index.is_file():
            return [path / BIN]
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if "/" in name or "\\" in name]
        missing = [name for name in names if not (path / name).is_file()]
        if outside or missing:
            raise CheckpointError(f"{index} names {(outside or missing)[0]!r}, which is not in its directory")
        return [path / name for name in names]
