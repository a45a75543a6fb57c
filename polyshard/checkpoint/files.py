"""The safetensors files of a Hugging Face directory, validated before any tensor is read."""

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
from polyshard.checkpoint.location import is_remote
from polyshard.checkpoint.plan import DTYPE_NAMES
from polyshard.checkpoint.remote.tensors import RemoteTensors
from polyshard.core.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors$")


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Return the file that holds each tensor, keyed by tensor name.

    Raises:
        CheckpointError: there are no weights, a file is missing or truncated, the index names a file outside the
            directory, the index disagrees with the files, or there are weights beside those of the index.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    index = directory / INDEX
    if index.is_file():
        return _from_index(directory, index)
    files = [directory / SINGLE] if (directory / SINGLE).is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in directory.iterdir())[:10]
        raise CheckpointError(f"{directory} holds no weights: expected {SINGLE} or {INDEX}, got {others}")
    _check_parts(directory, files)
    return _in_files(files)


def _check_parts(directory: Path, files: Sequence[Path]) -> None:
    """Check that no file of a numbered set is missing; without an index only the file names state the count."""
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
        raise CheckpointError(f"{index} is not a valid index ({type(error).__name__}: {error})") from None
    where: dict[str, Path] = {}
    held: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        path = directory / str(file_name)
        if path.parent != directory or "/" in str(file_name) or "\\" in str(file_name):
            raise CheckpointError(f"{index} places {name!r} in {file_name!r}, which is outside its directory")
        if path not in held:
            if not path.is_file():
                raise CheckpointError(f"{index} names the shard {file_name!r}, which does not exist")
            with opened(path) as file:
                held[path] = set(file.keys())
        if name not in held[path]:
            raise CheckpointError(f"{index} places {name!r} in {file_name!r}, which does not contain it")
        where[name] = path
    single = directory / SINGLE
    if single.is_file() and single not in held:
        raise CheckpointError(
            f"{directory} holds two models: got {SINGLE}, which transformers reads, beside {INDEX}, which vLLM reads. "
            "Remove the one that is out of date."
        )
    for path, names in held.items():
        stray = sorted(names - {n for n, p in where.items() if p == path})
        if stray:
            raise CheckpointError(f"{path.name} holds tensors that are missing from the index: {stray[:5]}")
    return where


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        CheckpointError: the file is truncated or not a safetensors file.
    """
    with _open(path) as file:
        yield file


def _open(path: Path) -> Any:
    if is_remote(path):
        return RemoteTensors(path)
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or not a safetensors file: {error}. Copy or save it again."
        ) from None


class TensorReader:
    """Random access to tensors by name. Each file is mapped once and stays mapped while the reader exists.

    Of a file on a remote file system, only the header and the requested rows are transferred.

    Args:
        directory: a Hugging Face directory.
        stem: read `STEM.safetensors`, or `STEM-00001-of-00002.safetensors` and so on, instead of the model's files.
        prefix: left out of the names in the files.
    """

    def __init__(self, directory: Path, stem: str | None = None, prefix: str = "") -> None:
        found = find(directory)
        where = locate_tensors(found) if stem is None else _in_files(_of_stem(found, stem))
        self._stored = {name.removeprefix(prefix): name for name in where}
        self.where = {name: where[stored] for name, stored in self._stored.items()}
        self._open: dict[Path, Any] = {}

    def _file(self, name: str) -> Any:
        path = self.where[name]
        if path not in self._open:
            self._open[path] = _open(path)
        return self._open[path]

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype as stored.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        found = str(self._slice(name).get_dtype())
        for dtype, text in DTYPE_NAMES.items():
            if text == found:
                return dtype
        raise CheckpointError(f"tensor {name!r} has the unsupported dtype {found}")

    def region(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a rectangle of a tensor and nothing else."""
        part = self._slice(name)
        if not sizes:
            return self._file(name).get_tensor(self._stored[name])
        return part[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape as stored."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Read the full tensor."""
        return self._file(name).get_tensor(self._stored[name])
