"""Exchange of a checkpoint's elements between ranks that share no file system, so that each file has one writer.

A rank that writes a file gets the rectangles that other ranks hold of it, one after the other, over a process group of
gloo. All ranks go through the same list of transfers in the same order, so that no two wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polyshard.checkpoint.plan import PlannedFile, StoredTensor
from polyshard.checkpoint.storage import Progress, Rectangle, allocate, check_complete, put, slices
from polyshard.core.ranks import Ranks
from polyshard.weights.fingerprint import fingerprint, total


@dataclass(frozen=True, slots=True)
class _Transfer:
    source: int
    number: int  # of the rectangle, on the source
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def writers(files: Sequence[PlannedFile], ranks: Ranks) -> dict[str, int]:
    """Return the rank that writes each file. A collective.

    The files are divided by size, and machines take turns.
    """
    local = ranks.gather(int(os.environ.get("LOCAL_RANK", "0")))
    order = sorted(range(ranks.size), key=lambda rank: (local[rank], rank))
    load = dict.fromkeys(order, 0)
    result: dict[str, int] = {}
    for file in sorted(files, key=lambda f: -f.size):
        chosen = min(order, key=lambda rank: load[rank])
        load[chosen] += file.size
        result[file.path] = chosen
    return result


def write_files(
    folder: Path,
    files: Sequence[PlannedFile],
    owner: Mapping[str, int],
    held: Sequence[Rectangle],
    ranks: Ranks,
    what: str,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write each file on its rank, into `folder` on that rank, and return the fingerprint of each tensor.

    This is a collective.

    Args:
        folder: a local folder of this rank.
        files: all files, in the same order on every rank.
        owner: the rank that writes each file, from `writers`.
        held: the rectangles that this rank holds; those of all ranks cover each tensor once.
        ranks: all ranks, with a group of gloo.
        what: the beginning of an error's message.
        progress: called with (elements sent or written, total elements) of this rank.

    Raises:
        CheckpointError: a rank could not write, or elements are missing; raised on every rank.
        RankFailureError: a rank crashed, hung, or cannot be reached.
    """
    where = {tensor.key: (file, tensor) for file in files for tensor in file.tensors}
    all_held = ranks.gather([(r.key, r.offsets, tuple(r.values.shape)) for r in held])
    check_complete(where, [(key, shape) for part in all_held for key, _, shape in part])
    mine = [file for file in files if owner[file.path] == ranks.rank]
    ranks.run_on_all(lambda: [allocate(folder / file.path, file) for file in mine], what)

    of_owner: dict[int, list[_Transfer]] = {}
    for source, part in enumerate(all_held):
        for number, (key, offsets, shape) in enumerate(part):
            of_owner.setdefault(owner[where[key][0].path], []).append(_Transfer(source, number, key, offsets, shape))
    prints: dict[str, int] = {}
    done, elements = 0, sum(r.values.numel() for r in held)
    error: Exception | None = None
    with _Files(folder) as opened, ranks.guard("world checkpoint exchange"):
        for target, transfer in _in_turns(of_owner):
            file, tensor = where[transfer.key]
            if ranks.rank == transfer.source:
                values = held[transfer.number].values
                for chunk, offsets in slices(values, transfer.offsets, tensor.dtype):
                    prints[transfer.key] = total((prints.get(transfer.key, 0), fingerprint(chunk, offsets)))
                    if target == ranks.rank:
                        error = error or opened.put(file, tensor, chunk, offsets)
                    elif chunk.numel():
                        _send(chunk, target, ranks)
                done += values.numel()
                if progress is not None:
                    progress(done, elements)
            elif ranks.rank == target:
                # What fails here is told after the exchange: the senders must not wait in vain.
                empty = torch.empty(transfer.shape, dtype=tensor.dtype, device="meta")
                for shape, offsets in ((c.shape, o) for c, o in slices(empty, transfer.offsets, tensor.dtype)):
                    chunk = torch.empty(shape, dtype=tensor.dtype)
                    if chunk.numel():
                        _receive(chunk, transfer.source, ranks)
                    error = error or opened.put(file, tensor, chunk, offsets)
    ranks.raise_on_all(error, what)
    parts = ranks.gather(prints)
    return {key: total(part[key] for part in parts if key in part) for key in where}


class _Files:
    """The files of this rank, opened at first use."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._open = folder, dict[str, int]()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def put(self, file: PlannedFile, tensor: StoredTensor, values: torch.Tensor, offsets: Sequence[int]) -> Any:
        """Write a rectangle; return the error if that fails."""
        try:
            if file.path not in self._open:
                self._open[file.path] = os.open(self._folder / file.path, os.O_WRONLY)
            put(self._open[file.path], file.places[tensor.key], tensor, values, offsets)
        except OSError as error:
            return error
        return None


def _in_turns(of_owner: Mapping[int, list[_Transfer]]) -> Iterator[tuple[int, _Transfer]]:
    """Yield the transfers to each owner in turn, so that all of them are busy."""
    for turn in zip_longest(*(of_owner[owner] for owner in sorted(of_owner))):
        for owner, transfer in zip(sorted(of_owner), turn):
            if transfer is not None:
                yield owner, transfer


def _send(values: torch.Tensor, target: int, ranks: Ranks) -> None:
    dist.send(_bytes(values.contiguous()), dst=target, group=ranks.group)


def _receive(values: torch.Tensor, source: int, ranks: Ranks) -> None:
    dist.recv(_bytes(values), src=source, group=ranks.group)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor: gloo knows no eight-bit floats."""
    return values.reshape(-1).view(torch.uint8)
