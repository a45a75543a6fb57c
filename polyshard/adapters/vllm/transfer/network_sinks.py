"""The memory of a served model, into which parts are received."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from polyshard.adapters.vllm.transfer.receiver import NativeReceiver, ServedReceiver
from polyshard.weights.movement import rectangle
from polyshard.weights.transfers import Need, Part


class Sink(Protocol):
    """The memory of a model. It is used in a `with` statement, whose end waits for all layers."""

    def target(self, part: Part) -> torch.Tensor:
        """Return the memory of a part."""
        ...

    def mark(self, part: Part) -> None:
        """Record that a part is in its memory."""
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


class ShardSink:
    """The shards of a model that was registered with polyshard.

    Complete layers are processed (vLLM packs those of a CPU) in a thread, while others are received.
    """

    def __init__(self, receiver: ServedReceiver, needs: Sequence[Need]) -> None:
        self._receiver, self._needs = receiver, needs
        self._missing = [need.numel for need in needs]
        self._pool = ThreadPoolExecutor(1, "polyshard-layers")
        self._running: list[Future[None]] = []

    def target(self, part: Part) -> torch.Tensor:
        """Return the part's rectangle of its parameter."""
        receiver, name = self._receiver, self._needs[part.need].name
        shard = receiver.shard(receiver.targets[name][0])
        region = next(r for r in receiver.regions[name] if _contains((r.offsets, r.sizes), part))
        inner = tuple(offset - origin for offset, origin in zip(part.offsets, region.offsets))
        return rectangle(region.view(shard), inner, part.sizes)

    def mark(self, part: Part) -> None:
        """Record that a part is in its parameter."""
        self._missing[part.need] -= part.numel
        if self._missing[part.need] == 0:
            name = self._needs[part.need].name
            self._running.append(self._pool.submit(_in_mode_of_caller(lambda: self._receiver.mark_received(name))))

    def __enter__(self) -> ShardSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._running:
                future.result()


class FullSink:
    """Full tensors for vLLM's own models, which cut and load them themselves."""

    def __init__(self, receiver: NativeReceiver, needs: Sequence[Need], dtype: torch.dtype) -> None:
        self._receiver, self._needs, self._dtype = receiver, needs, dtype
        self._partial: dict[int, torch.Tensor] = {}
        self._missing = [math.prod(need.shape) for need in needs]

    def target(self, part: Part) -> torch.Tensor:
        """Return the part's rectangle of the full tensor."""
        if part.need not in self._partial:
            self._partial[part.need] = torch.empty(self._needs[part.need].shape, dtype=self._dtype)
        return rectangle(self._partial[part.need], part.offsets, part.sizes)

    def mark(self, part: Part) -> None:
        """Record that a part is in its tensor, and load the tensor if it is complete."""
        self._missing[part.need] -= part.numel
        if self._missing[part.need] == 0:
            self._receiver.load({self._needs[part.need].name: self._partial.pop(part.need)})

    def __enter__(self) -> FullSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._partial.clear()


def _in_mode_of_caller(action: Callable[[], None]) -> Callable[[], None]:
    """Return the action with this thread's modes of torch, which belong to each thread."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            action()

    return run


def _contains(box: tuple[tuple[int, ...], tuple[int, ...]], part: Part) -> bool:
    return all(o <= p and p + q <= o + s for o, s, p, q in zip(*box, part.offsets, part.sizes))
