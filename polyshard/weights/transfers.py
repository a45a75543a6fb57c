"""Who sends what to whom: the rectangles in which the shards of many senders and of a receiver overlap.

Senders and receivers are cut in different ways, by other tensor-parallel sizes, ZeRO, FSDP2 or pipelines. Both describe
what they hold as rectangles of stored tensors, so what one must send to another is their intersection: nothing is
gathered, and no byte is sent that the receiver does not keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyshard.weights.regions import Region

ALIGN = 64  # bytes
_ALONE = 1 << 20  # bytes of a part that is sent without a copy if its memory is contiguous

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes in the stored tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One stored tensor of which a receiver keeps parts.

    Attributes:
        name: its name at the receiver.
        aliases: other names under which a sender may hold it (tied weights).
        shape: its full shape.
        boxes: the parts that the receiver keeps, which do not overlap.
    """

    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements that the receiver keeps."""
        return sum(math.prod(sizes) for _, sizes in self.boxes)

    def to_json(self) -> list[Any]:
        """Return the fields as JSON."""
        return [self.name, self.shape, self.boxes, self.aliases]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Need:
        """Return the need that `to_json` encoded."""
        name, shape, boxes, aliases = fields
        return cls(name=name, shape=tuple(shape), boxes=tuple(map(_box, boxes)), aliases=tuple(aliases))


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle that one sender sends to one receiver.

    Attributes:
        need: index of the tensor in the receiver's list of needs.
        offsets: offsets in the stored tensor.
        sizes: sizes.
        source: index of the region in the sender's list, which contains the rectangle; -1 at the receiver.
    """

    need: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    source: int = -1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


Message = tuple[Part, ...]  # parts that are sent together, in one buffer


def parts_for(needs: Sequence[Need], held: Mapping[str, Sequence[tuple[int, Region]]], known: set[str]) -> list[Part]:
    """Return what a sender sends to a receiver, in the order of the receiver's needs.

    Args:
        needs: the receiver's needs.
        held: the sender's regions by stored name, each with its index.
        known: the names that any sender holds.

    Examples:
        >>> table = ps.collect_layouts(torch.nn.Linear(4, 3, bias=False))
        >>> from polyshard.weights.regions import regions
        >>> held = {"weight": list(enumerate(regions(table["weight"], 0, 1)))}
        >>> need = Need(name="weight", shape=(3, 4), boxes=(((0, 2), (3, 2)),))
        >>> [(part.offsets, part.sizes) for part in parts_for([need], held, {"weight"})]
        [((0, 2), (3, 2))]
    """
    parts = []
    for index, need in enumerate(needs):
        name = sender_name(need, known)
        for number, region in held.get(name, ()) if name is not None else ():
            for box in need.boxes:
                common = _intersection((region.offsets, region.sizes), box)
                if common is not None:
                    parts.append(Part(index, *common, source=number))
    return parts


def sender_name(need: Need, known: set[str]) -> str | None:
    """Return the name under which the senders hold a tensor; None if they do not hold it."""
    return next((name for name in (need.name, *need.aliases) if name in known), None)


def plan_messages(parts: Iterable[Part], itemsize: int, limit: int) -> list[Message]:
    """Divide parts, in order, into messages of at most `limit` bytes. A larger part is cut.

    A part of at least 1 MiB is a message of its own, so that both ends can use the tensors' memory without a copy.

    Examples:
        >>> [[part.sizes for part in message] for message in plan_messages([Part(0, (0, 0), (3, 100))], 4, 1000)]
        [[(2, 100)], [(1, 100)]]
    """
    messages: list[Message] = []
    current: list[Part] = []
    used = 0
    for part in parts:
        for piece in _cut(part, max(1, limit // itemsize)):
            size = padded(piece.numel * itemsize)
            if size >= _ALONE:
                messages.append((piece,))
                continue
            if current and used + size > limit:
                messages.append(tuple(current))
                current, used = [], 0
            current.append(piece)
            used += size
    return [*messages, tuple(current)] if current else messages


def padded(nbytes: int) -> int:
    """Return the bytes that a part takes up in a buffer."""
    return -(-nbytes // ALIGN) * ALIGN


def message_bytes(message: Message, itemsize: int) -> int:
    """Return the size of a message's buffer."""
    return sum(padded(part.numel * itemsize) for part in message)


def flat_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a tensor's memory as bytes, to send or receive without a copy; None if a copy is needed."""
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return tensor.detach().view(-1).view(torch.uint8)


def unpack(message: Message, buffer: torch.Tensor, dtype: torch.dtype) -> list[tuple[Part, torch.Tensor]]:
    """Return the parts of a message with views of their values."""
    views, start = [], 0
    for part in message:
        nbytes = part.numel * dtype.itemsize
        views.append((part, buffer[start : start + nbytes].view(dtype).view(part.sizes)))
        start += padded(nbytes)
    return views


def messages_to_json(messages: Sequence[Message]) -> list[Any]:
    """Return messages as JSON, for the receiver."""
    return [[[part.need, part.offsets, part.sizes] for part in message] for message in messages]


def messages_from_json(fields: Sequence[Any]) -> list[Message]:
    """Return the messages that `messages_to_json` encoded."""
    return [tuple(Part(need, *_box((offsets, sizes))) for need, offsets, sizes in message) for message in fields]


def message_order(index: int, sender: int, receiver: int, receivers: int) -> tuple[int, int, int, int]:
    """Return the sort key of a message, by which senders and receivers handle their messages.

    All processes follow one order, in which the senders of a round serve different receivers. Of the messages that are
    not complete, the first is the next one of both its sender and its receiver, so that none can wait in a circle.

    Args:
        index: position among the messages from this sender to this receiver.
        sender: the sender.
        receiver: the receiver.
        receivers: the number of receivers.
    """
    return index, (receiver - sender) % receivers, sender, receiver


def uncovered(needs: Sequence[Need], parts: Iterable[Part]) -> list[str]:
    """Return a description of each tensor of which a receiver gets fewer or more elements than it keeps."""
    got = [0] * len(needs)
    for part in parts:
        got[part.need] += part.numel
    return [f"{n.name}: {g} of {n.numel} elements" for n, g in zip(needs, got) if g != n.numel]


def _cut(part: Part, limit: int) -> Iterator[Part]:
    """Cut a part into rectangles of at most `limit` elements, along its first dimension that is longer than 1."""
    if part.numel <= limit:
        yield part
        return
    dim = next(d for d, size in enumerate(part.sizes) if size > 1)
    step = max(1, limit // math.prod(part.sizes[dim + 1 :]))
    for start in range(0, part.sizes[dim], step):
        offsets, sizes = list(part.offsets), list(part.sizes)
        offsets[dim] += start
        sizes[dim] = min(step, sizes[dim] - start)
        yield from _cut(Part(part.need, tuple(offsets), tuple(sizes), part.source), limit)


def _intersection(a: Box, b: Box) -> Box | None:
    offsets = tuple(max(x, y) for x, y in zip(a[0], b[0]))
    ends = (min(x + m, y + n) for x, m, y, n in zip(a[0], a[1], b[0], b[1]))
    sizes = tuple(end - offset for end, offset in zip(ends, offsets))
    return None if any(size <= 0 for size in sizes) else (offsets, sizes)


def _box(fields: Sequence[Any]) -> Box:
    return tuple(fields[0]), tuple(fields[1])
