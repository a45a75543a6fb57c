"""A worker's end of a sync over the network: it receives the parts that it keeps, and checks them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from polyshard.adapters.vllm.transfer.link import WINDOW, Link, first_line
from polyshard.adapters.vllm.transfer.receiver import NativeReceiver, Receiver, ServedReceiver
from polyshard.core.errors import WeightSyncError
from polyshard.weights.fingerprint import fingerprint, text, total
from polyshard.weights.movement import rectangle
from polyshard.weights.transfers import (
    Message,
    Need,
    Part,
    message_bytes,
    message_order,
    messages_from_json,
    uncovered,
    unpack,
)


class Sink(Protocol):
    """The memory of a model that takes up parts."""

    def put(self, part: Part, values: torch.Tensor) -> int:
        """Write a part, and return the fingerprint of what was written, read back from the memory."""
        ...


def needs_of(receiver: Receiver) -> list[Need] | None:
    """Return the parts that a worker keeps; None for all tensors in full."""
    if not isinstance(receiver, ServedReceiver):
        return None
    aliases = {entry.checkpoint_names[0]: entry.tied_names for entry in receiver.table.values()}
    return [
        Need(
            name=name,
            shape=parts[0].shape,
            boxes=tuple((region.offsets, region.sizes) for region in parts),
            aliases=tuple(aliases.get(name, ())),
        )
        for name, parts in receiver.regions.items()
    ]


class NetworkReceiver:
    """One worker's connection to a trainer.

    Args:
        link: the connection.
        receiver: the receiver of the worker's model.
        worker: the worker's number in the engine.
        workers: the number of the engine's workers.
        senders: the number of trainer ranks.
        dtype: dtype in which tensors are sent.
    """

    def __init__(
        self, link: Link, receiver: Receiver, worker: int, workers: int, senders: int, dtype: torch.dtype
    ) -> None:
        self._link, self._receiver = link, receiver
        self._worker, self._workers, self._senders, self._dtype = worker, workers, senders, dtype
        self._needs = needs_of(receiver)
        self._plan: list[tuple[int, int, Message]] = []  # sender, index, message

    def connect(self) -> None:
        """Read what each trainer rank will send, and join the group.

        Raises:
            WeightSyncError: the trainer ranks do not send everything that this worker keeps.
        """
        if self._needs is None:
            self._needs = [Need.from_json(fields) for fields in self._link.read("tensors")]
        plan = []
        for sender in range(self._senders):
            for index, message in enumerate(messages_from_json(self._link.read(f"plan/{sender}/{self._worker}"))):
                plan.append((message_order(index, sender, self._worker, self._workers), sender, index, message))
        self._plan = [step[1:] for step in sorted(plan, key=lambda step: step[0])]
        wrong = uncovered(self._needs, (part for _, _, message in self._plan for part in message))
        if wrong:
            raise WeightSyncError(f"the trainer does not send {len(wrong)} tensors completely: {'; '.join(wrong[:5])}")
        self._link.connect()

    def receive(self, update: int) -> None:
        """Receive everything of one update, and compare its fingerprints with those of the trainer.

        Raises:
            WeightSyncError: a trainer rank failed, or a tensor arrived damaged.
        """
        assert self._needs is not None
        sink = self._sink(self._needs)
        found = [0] * len(self._needs)
        size = max((message_bytes(message, self._dtype.itemsize) for _, _, message in self._plan), default=0)
        buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(min(WINDOW, len(self._plan)))]
        flying: deque[Any] = deque()
        steps = iter(self._plan)

        def post(buffer: torch.Tensor) -> None:
            step = next(steps, None)
            if step is not None:
                part = buffer[: message_bytes(step[2], self._dtype.itemsize)]
                flying.append((step, buffer, self._link.receive(part, step[0], step[1])))

        for buffer in buffers:
            post(buffer)
        while flying:
            (sender, _, message), buffer, work = flying.popleft()
            try:
                work.wait()
            except RuntimeError as error:
                raise WeightSyncError(
                    f"trainer rank {sender} died, froze, or cannot be reached ({first_line(error)})"
                ) from error
            for part, values in unpack(message, buffer, self._dtype):
                found[part.need] += sink.put(part, values)
            post(buffer)
        self._verify(update, found)

    def _sink(self, needs: Sequence[Need]) -> Sink:
        if isinstance(self._receiver, ServedReceiver):
            return ShardSink(self._receiver, needs)
        assert isinstance(self._receiver, NativeReceiver)
        return FullSink(self._receiver, needs, self._dtype)

    def _verify(self, update: int, found: Sequence[int]) -> None:
        assert self._needs is not None
        sent = [0] * len(self._needs)
        for sender in range(self._senders):
            key = f"sent/{update}/{sender}/{self._worker}"
            for need, print_ in self._link.read(key):
                sent[need] += print_
            self._link.delete(key)
        for need, want, got in zip(self._needs, sent, found):
            if total((want,)) != total((got,)):
                raise WeightSyncError(
                    f"{need.name!r} arrived damaged in worker {self._worker}: sent {text(want)}, found {text(got)}",
                    (need.name,),
                    (self._worker,),
                )


class ShardSink:
    """Writes parts into the shards of a model that was registered with polyshard."""

    def __init__(self, receiver: ServedReceiver, needs: Sequence[Need]) -> None:
        self._receiver = receiver
        self._needs = needs
        self._missing = [need.numel for need in needs]

    def put(self, part: Part, values: torch.Tensor) -> int:
        """Write a part, and return its fingerprint as read back from the parameter."""
        receiver, name = self._receiver, self._needs[part.need].name
        shard = receiver.shard(receiver.targets[name][0])
        region = next(r for r in receiver.regions[name] if _contains((r.offsets, r.sizes), part))
        inner = tuple(offset - origin for offset, origin in zip(part.offsets, region.offsets))
        target = rectangle(region.view(shard), inner, part.sizes)
        target.copy_(values)
        written = target if target.dtype == values.dtype else target.to(values.dtype)  # a bias may be float32
        print_ = fingerprint(written, part.offsets)
        self._missing[part.need] -= part.numel
        if self._missing[part.need] == 0:
            receiver.mark_received(name)
        return print_


class FullSink:
    """Assembles full tensors for vLLM's own models, which cut and load them themselves."""

    def __init__(self, receiver: NativeReceiver, needs: Sequence[Need], dtype: torch.dtype) -> None:
        self._receiver = receiver
        self._needs, self._dtype = needs, dtype
        self._partial: dict[int, tuple[torch.Tensor, int]] = {}  # the tensor, and the elements that it lacks

    def put(self, part: Part, values: torch.Tensor) -> int:
        """Write a part, load its tensor if complete, and return the part's fingerprint."""
        need = self._needs[part.need]
        if part.need not in self._partial:
            self._partial[part.need] = torch.empty(need.shape, dtype=self._dtype), math.prod(need.shape)
        full, missing = self._partial[part.need]
        target = rectangle(full, part.offsets, part.sizes)
        target.copy_(values)
        print_ = fingerprint(target, part.offsets)
        self._partial[part.need] = full, missing - part.numel
        if missing == part.numel:
            self._receiver.load({need.name: full})
            del self._partial[part.need]
        return print_


def _contains(box: tuple[tuple[int, ...], tuple[int, ...]], part: Part) -> bool:
    return all(o <= p and p + q <= o + s for o, s, p, q in zip(*box, part.offsets, part.sizes))
