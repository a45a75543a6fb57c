"""Verification of a sync: fingerprints sent by trainer ranks against those read back from the engines' workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from polyshard.core.errors import WeightSyncError
from polyshard.weights.fingerprint import fingerprint, text, total
from polyshard.weights.movement import Moved, rectangle

Arrived = tuple[int, int, Moved]  # engine, worker, and the region read back


class EngineKind(NamedTuple):
    """The numbering of an engine's workers.

    Attributes:
        in_ranks: whether its workers are the trainer's ranks, and not separate processes.
        tensor_size: number of workers per copy of the model.
    """

    in_ranks: bool
    tensor_size: int


class DirectRecord(NamedTuple):
    """The record of what one trainer rank moved within its memory.

    Attributes:
        tensor_rank: the trainer rank's position on its tensor axis.
        sent: fingerprint of its shard, by engine and stored name.
        arrived: regions read back from the workers in its process.
    """

    tensor_rank: int
    sent: Mapping[tuple[int, str], int]
    arrived: Sequence[Arrived]


def verify_direct(everywhere: Sequence[DirectRecord], kinds: Sequence[EngineKind]) -> None:
    """Compare each copy of the model with the weights of the trainer ranks in the same processes.

    Args:
        everywhere: the record of each trainer rank, in rank order.
        kinds: the kind of each engine.

    Raises:
        WeightSyncError: a sum of fingerprints differs, or data-parallel ranks of the trainer hold different values.
    """
    sent: dict[tuple[int, int, str], dict[int, int]] = {}  # by engine, copy and tensor; by trainer tensor rank
    found: dict[tuple[int, int, str], int] = {}
    for rank, record in enumerate(everywhere):
        for (number, name), print_ in record.sent.items():
            parts = sent.setdefault((number, rank // kinds[number].tensor_size, name), {})
            if parts.setdefault(record.tensor_rank, print_) != print_:
                message = f"{name!r}: data-parallel ranks of the trainer hold different values (rank {rank} is one)"
                raise WeightSyncError(message, (name,))
        for number, _, moved in record.arrived:
            if moved.first:
                key = (number, rank // kinds[number].tensor_size, moved.name)
                found[key] = total((found.get(key, 0), moved.print))
    for key, parts in sent.items():
        want = total(parts.values())
        if want != found.get(key):
            (number, copy, name), size = key, kinds[key[0]].tensor_size
            raise WeightSyncError(
                f"{name!r} arrived damaged in the workers on ranks {list(range(copy * size, copy * size + size))} "
                f"of engine {number}: sent {text(want)}, found {text(found.get(key, 0))}",
                (name,),
                tuple(range(size)),
            )


def verify_chunk(
    sent: Mapping[str, int],
    everywhere: Sequence[Sequence[Arrived]],
    buffers: Mapping[str, torch.Tensor],
    kinds: Sequence[EngineKind],
    rank: int,
) -> None:
    """Compare each copy of the model with the tensors that all trainer ranks wrote into the shared buffers.

    Args:
        sent: fingerprint of each tensor, summed over the trainer's ranks.
        everywhere: regions read back from the workers that each trainer rank delivered to, in rank order.
        buffers: full tensors by stored name.
        kinds: the kind of each engine.
        rank: this trainer rank, which checks the regions that several of its workers hold.

    Raises:
        WeightSyncError: a tensor differs; the message names tensor, worker and position.
    """
    found: dict[tuple[int, int], dict[str, int]] = {}  # by engine and copy of the model
    for sender, part in enumerate(everywhere):
        for number, worker, moved in part:
            if moved.first:
                copy = (sender if kinds[number].in_ranks else worker) // kinds[number].tensor_size
                sums = found.setdefault((number, copy), {})
                sums[moved.name] = total((sums.get(moved.name, 0), moved.print))
    wrong = {name for sums in found.values() for name in sent if sums.get(name) != sent[name]}
    replicated = [arrived for arrived in everywhere[rank] if not arrived[2].first]
    suspects = [arrived for part in everywhere for arrived in part if arrived[2].name in wrong] + replicated
    for number, worker, moved in suspects:
        want = fingerprint(rectangle(buffers[moved.name], moved.offsets, moved.sizes), moved.offsets)
        if moved.print != want:
            raise WeightSyncError(
                f"{moved.name!r} arrived damaged in worker {worker} of engine {number}: sent {text(want)}, "
                f"found {text(moved.print)} at {list(moved.offsets)}",
                (moved.name,),
                (worker,),
            )
    if wrong:
        name = min(wrong)
        raise WeightSyncError(
            f"{name!r} was changed in the bucket: expected {text(sent[name])} as the trainer wrote it", tuple(wrong)
        )
