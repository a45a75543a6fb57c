"""The proof of a sync: fingerprints of what trainer ranks sent and of what stands in the engines' workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from polyshard.core.errors import WeightSyncError
from polyshard.weights.fingerprint import fingerprint, text, total
from polyshard.weights.movement import Moved, rectangle

Arrived = tuple[int, int, Moved]  # engine, worker, and what stands there


class EngineKind(NamedTuple):
    """How an engine's workers are numbered.

    Attributes:
        in_ranks: its workers are the trainer's ranks, and not processes of the engine.
        tensor_size: workers of one copy of the model.
    """

    in_ranks: bool
    tensor_size: int


class DirectRecord(NamedTuple):
    """What one trainer rank moved from memory to memory.

    Attributes:
        tensor_rank: the trainer rank's position along its tensor axis.
        sent: fingerprint of its part, by engine and stored name.
        arrived: what then stood in the workers of its process.
    """

    tensor_rank: int
    sent: Mapping[tuple[int, str], int]
    arrived: Sequence[Arrived]


def verify_direct(everywhere: Sequence[DirectRecord], kinds: Sequence[EngineKind]) -> None:
    """Compare what each copy of the model holds with what the trainer ranks of the same processes hold.

    Args:
        everywhere: of each trainer rank, in rank order.
        kinds: of each engine.

    Raises:
        WeightSyncError: a sum of fingerprints differs, or data-parallel ranks of the trainer hold different values.
    """
    sent: dict[tuple[int, int, str], dict[int, int]] = {}  # by engine, copy and tensor; by trainer tensor rank
    found: dict[tuple[int, int, str], int] = {}
    for rank, record in enumerate(everywhere):
        for (number, name), print_ in record.sent.items():
            parts = sent.setdefault((number, rank // kinds[number].tensor_size, name), {})
            if parts.setdefault(record.tensor_rank, print_) != print_:
                told = f"{name!r}: data-parallel ranks of the trainer hold different values (rank {rank} is one)"
                raise WeightSyncError(told, (name,))
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
    """Compare what each copy of the model holds with what all trainer ranks wrote into the shared buffers.

    Args:
        sent: fingerprint of each tensor, summed over the trainer's ranks.
        everywhere: what stands in the workers that each trainer rank has delivered to, in rank order.
        buffers: full tensors by stored name.
        kinds: of each engine.
        rank: this trainer rank's, which looks at the parts that several of its workers hold.

    Raises:
        WeightSyncError: naming tensor, worker and place.
    """
    found: dict[tuple[int, int], dict[str, int]] = {}  # engine, and which of its copies
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
            f"{name!r} did not pass through the bucket as the trainer wrote it ({text(sent[name])})", tuple(wrong)
        )
