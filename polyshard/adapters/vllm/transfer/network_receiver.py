"""A worker's end of a sync over the network: it receives the parts that it keeps, and checks them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from polyshard.adapters.vllm.transfer.link import Link, Window, first_line
from polyshard.adapters.vllm.transfer.network_sinks import FullSink, ShardSink, Sink
from polyshard.adapters.vllm.transfer.receiver import NativeReceiver, Receiver, ServedReceiver
from polyshard.core.errors import WeightSyncError
from polyshard.weights.fingerprint import fingerprint, text, total
from polyshard.weights.transfers import (
    Message,
    Need,
    Part,
    flat_bytes,
    message_bytes,
    message_order,
    messages_from_json,
    uncovered,
    unpack,
)


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
        found = [0] * len(self._needs)
        window = Window()
        steps = deque(self._plan)
        with self._sink(self._needs) as sink:
            while steps or len(window):
                while steps and window.admits(message_bytes(steps[0][2], self._dtype.itemsize)):
                    self._post(window, sink, *steps.popleft())
                sender, message, targets, buffer, work = window.pop()
                try:
                    work.wait()
                except RuntimeError as error:
                    raise _unreachable(sender, error) from error
                if buffer is not None:
                    for (_, values), target in zip(unpack(message, buffer, self._dtype), targets):
                        target.copy_(values)
                    window.give_back(buffer)
                for part, target in zip(message, targets):
                    found[part.need] += self._read_back(part, target)
                    sink.mark(part)
        self._verify(update, found)

    def _post(self, window: Window, sink: Sink, sender: int, index: int, message: Message) -> None:
        """Start to receive a message, into the model's memory if it is one contiguous part."""
        targets = [sink.target(part) for part in message]
        nbytes, buffer = message_bytes(message, self._dtype.itemsize), None
        data = flat_bytes(targets[0], self._dtype) if len(message) == 1 else None
        if data is None:
            buffer = window.buffer(nbytes)
            data = buffer[:nbytes]
        try:
            work = self._link.receive(data, sender, index)  # the first one connects
        except RuntimeError as error:
            raise _unreachable(sender, error) from error
        window.push((sender, message, targets, buffer, work), nbytes)

    def _read_back(self, part: Part, target: torch.Tensor) -> int:
        """Return the fingerprint of a part as it is in the model."""
        written = target if target.dtype == self._dtype else target.to(self._dtype)  # a bias may be float32
        return fingerprint(written, part.offsets)

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


def _unreachable(sender: int, error: RuntimeError) -> WeightSyncError:
    return WeightSyncError(f"trainer rank {sender} died, froze, or cannot be reached ({first_line(error)})")
