"""The safetensors files of a Hugging Face directory, checked before anything is read from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from polyshard.checkpoint.directory import find
from polyshard.checkpoint.plan import DTYPE_NAMES
from polyshard.core.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors$")


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor.

    Raises:
        CheckpointError: no weights, a shard that is missing or torn, an index that names a file outside the
            directory, or one that disagrees with its shards.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    index = directory / INDEX
    if index.is_file():
        return _from_index(directory, index)
    files = [directory / SINGLE] if (directory / SINGLE).is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in directory.iterdir())[:10]
        raise CheckpointError(f"{directory} holds no {SINGLE} and no {INDEX}; it holds {others}")
    _check_parts(directory, files)
    return _in_files(files)


def _check_parts(directory: Path, files: Sequence[Path]) -> None:
    """Without an index the names of the files tell how many there are."""
    found: dict[str, set[int]] = {}
    for file in files:
        if match := _PART.match(file.name):
            found.setdefault(f"{match[1]}|{match[3]}", set()).add(int(match[2]))
    for key, numbers in found.items():
        stem, _, count = key.partition("|")
        missing = sorted(set(range(1, int(count) + 1)) - numbers)
        if missing:
            raise CheckpointError(
                f"{directory} is incomplete: {stem}-{missing[0]:05d}-of-{count}.safetensors is missing, got "
                f"{len(numbers)} "
                f"of {int(count)} files. Copy all of them, and {INDEX}."
            )


def _of_stem(directory: Path, stem: str) -> list[Path]:
    files = sorted([*directory.glob(f"{stem}.safetensors"), *directory.glob(f"{stem}-?????-of-?????.safetensors")])
    if not files:
        raise CheckpointError(f"{directory / stem}.safetensors is missing")
    return files


def _in_files(files: Sequence[Path]) -> dict[str, Path]:
    where: dict[str, Path] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name in where:
                    raise CheckpointError(f"tensor {name!r} is in both {where[name].name} and {path.name}")
                where[name] = path
    return where


def _from_index(directory: Path, index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert isinstance(weight_map, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{index} is no valid index ({type(error).__name__}: {error})") from None
    where: dict[str, Path] = {}
    held: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        path = directory / str(file_name)
        if path.parent != directory or "/" in str(file_name) or "\\" in str(file_name):
            raise CheckpointError(f"{index} places {name!r} in {file_name!r}, outside its directory")
        if path not in held:
            if not path.is_file():
                raise CheckpointError(f"{index} names the shard {file_name!r}, which does not exist")
            with opened(path) as file:
                held[path] = set(file.keys())
        if name not in held[path]:
            raise CheckpointError(f"{index} places {name!r} in {file_name!r}, which does not hold it")
        where[name] = path
    for path, names in held.items():
        stray = sorted(names - {n for n, p in where.items() if p == path})
        if stray:
            raise CheckpointError(f"{path.name} holds tensors that the index does not name: {stray[:5]}")
    return where


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        CheckpointError: it is truncated or is no safetensors file.
    """
    with _open(path) as file:
        yield file


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is torn or no safetensors file: {error}; copy or save it again"
        ) from None


class TensorReader:
    """Tensors by name; each file is mapped once, for as long as the reader lives.

    Args:
        directory: a Hugging Face directory.
        stem: read `STEM.safetensors`, or `STEM-00001-of-00002.safetensors` and so on, instead of the model's files.
    """

    def __init__(self, directory: Path, stem: str | None = None) -> None:
        found = find(directory)
        self.where = locate_tensors(found) if stem is None else _in_files(_of_stem(found, stem))
        self._open: dict[Path, Any] = {}

    def _file(self, name: str) -> Any:
        path = self.where[name]
        if path not in self._open:
            self._open[path] = _open(path)
        return self._open[path]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored.

        Raises:
            CheckpointError: torch knows none of that name.
        """
        found = str(self._file(name).get_slice(name).get_dtype())
        for dtype, text in DTYPE_NAMES.items():
            if text == found:
                return dtype
        raise CheckpointError(f"tensor {name!r} is stored as {found}, which this polyshard cannot read")

    def region(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """A rectangle of a tensor; nothing else is read."""
        part = self._file(name).get_slice(name)
        if not sizes:
            return self._file(name).get_tensor(name)
        return part[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        return self._file(name).get_tensor(name)
