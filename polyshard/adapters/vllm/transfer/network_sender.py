"""A trainer rank's end of a sync over the network: it sends what it holds to the workers that keep it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from polyshard.adapters.vllm.transfer.link import CHUNK_BYTES, Link, Window, first_line
from polyshard.core.context import ParallelAxis
from polyshard.core.errors import WeightSyncError
from polyshard.core.pieces import Piece
from polyshard.weights.fingerprint import fingerprint
from polyshard.weights.movement import rectangle, shared_run
from polyshard.weights.regions import Region, regions
from polyshard.weights.transfers import (
    Message,
    Need,
    Part,
    flat_bytes,
    message_bytes,
    message_order,
    messages_to_json,
    parts_for,
    plan_messages,
    sender_name,
    unpack,
)
from polyshard.weights.view import WeightView

Source = tuple[str, int, Region]  # parameter, start of the piece, and the region of it that this rank sends


def held_regions(view: WeightView, axis: ParallelAxis, names: Iterable[str]) -> list[Source]:
    """Return what this rank sends, as regions of stored tensors that no other rank sends.

    Args:
        view: the trainer's weights.
        axis: the tensor axis.
        names: the stored names for which this rank's pipeline stage is responsible.
    """
    wanted = set(names)
    found: list[Source] = []
    for piece in view.pieces():
        entry = view.table[piece.parameter]
        start, stop = shared_run(piece, entry.layout.local_shape(axis.rank, axis.size))
        for region in regions(entry, axis.rank, axis.size, start, stop):
            if region.first and region.name in wanted:
                found.append((piece.parameter, piece.start, region))
    return found


class NetworkSender:
    """One trainer rank's connection to the workers of one engine.

    Args:
        link: the connection.
        rank: this trainer rank.
        senders: the number of trainer ranks.
        dtype: the engine's dtype.
        needs: the parts that each worker keeps.
        sources: what this rank sends, as returned by `held_regions`.
        known: the stored names that the trainer ranks hold together.
        chunk_bytes: size of a message.
    """

    def __init__(
        self,
        link: Link,
        rank: int,
        senders: int,
        dtype: torch.dtype,
        needs: Sequence[Sequence[Need]],
        sources: Sequence[Source],
        known: set[str],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._link, self._rank, self._senders, self._dtype = link, rank, senders, dtype
        self._sources = sources
        held: dict[str, list[tuple[int, Region]]] = {}
        for number, (_, _, region) in enumerate(sources):
            held.setdefault(region.name, []).append((number, region))
        plan = []
        self._workers = len(needs)
        for worker, wanted in enumerate(needs):
            messages = plan_messages(parts_for(wanted, held, known), dtype.itemsize, chunk_bytes)
            link.publish(f"plan/{rank}/{worker}", messages_to_json(messages))
            for index, message in enumerate(messages):
                plan.append((message_order(index, rank, worker, len(needs)), worker, index, message))
        self._plan: list[tuple[int, int, Message]] = [step[1:] for step in sorted(plan, key=lambda step: step[0])]
        self.nbytes = sum(message_bytes(message, dtype.itemsize) for _, _, message in self._plan)

    def connect(self) -> None:
        """Join the group."""
        self._link.connect()

    def send(self, update: int, pieces: Iterable[Piece]) -> None:
        """Send this rank's weights, and their fingerprints. Messages are in flight while the next is packed.

        Raises:
            WeightSyncError: a worker did not receive a message.
        """
        values = {(piece.parameter, piece.start): piece.values for piece in pieces}
        prints: list[dict[int, int]] = [{} for _ in range(self._workers)]
        window = Window()

        def settle() -> None:
            worker, buffer, work = window.pop()
            try:
                work.wait()
            except RuntimeError as error:
                raise _unreachable(worker, error) from error
            if buffer is not None:
                window.give_back(buffer)

        for worker, index, message in self._plan:
            nbytes = message_bytes(message, self._dtype.itemsize)
            while not window.admits(nbytes):
                settle()
            held = [self._values(part, values) for part in message]
            buffer, data = None, flat_bytes(held[0], self._dtype) if len(message) == 1 else None
            if data is None:
                buffer = window.buffer(nbytes)
                for (_, target), source in zip(unpack(message, buffer, self._dtype), held):
                    target.copy_(source)
                data = buffer[:nbytes]
            try:
                work = self._link.send(data, self._senders + worker, index)  # the first one connects
            except RuntimeError as error:
                raise _unreachable(worker, error) from error
            window.push((worker, buffer, work), nbytes)
            # While it is in flight: of the values as they are sent.
            sent = held if buffer is None else [target for _, target in unpack(message, buffer, self._dtype)]
            for part, tensor in zip(message, sent):
                prints[worker][part.need] = prints[worker].get(part.need, 0) + fingerprint(tensor, part.offsets)
        while len(window):
            settle()
        for worker, found in enumerate(prints):
            self._link.publish(f"sent/{update}/{self._rank}/{worker}", list(found.items()))

    def _values(self, part: Part, values: Mapping[tuple[str, int], torch.Tensor]) -> torch.Tensor:
        parameter, start, region = self._sources[part.source]
        inner = tuple(offset - origin for offset, origin in zip(part.offsets, region.offsets))
        return rectangle(region.view(values[parameter, start], start), inner, part.sizes)


def _unreachable(worker: int, error: RuntimeError) -> WeightSyncError:
    return WeightSyncError(f"worker {worker} died, froze, or cannot be reached ({first_line(error)})", (), (worker,))


def check_names(shapes: Mapping[str, tuple[int, ...]], needs: Sequence[Sequence[Need]]) -> None:
    """Raise if trainer and engine do not have the same tensors."""
    known = set(shapes)
    used: set[str] = set()
    for need in (need for wanted in needs for need in wanted):
        name = sender_name(need, known)
        if name is None:
            raise WeightSyncError(f"the trainer has no weight {need.name!r}, which the engine needs", (need.name,))
        if tuple(shapes[name]) != need.shape:
            raise WeightSyncError(
                f"{name!r} has the wrong shape for the engine: got {list(shapes[name])}, expected {list(need.shape)}",
                (name,),
            )
        used.update((need.name, *need.aliases))
    extra = sorted(known - used)
    if extra:
        raise WeightSyncError(f"{extra[0]!r} is not a weight of the engine's model", tuple(extra))
