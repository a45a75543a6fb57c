"""What all ranks of a job tell each other: small objects over the world's process group, and errors of any to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from polyshard.core.context import FailureGuard, ParallelContext, no_guard
from polyshard.core.errors import CheckpointError, PolyshardError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """All ranks of a job, or one process alone.

    Attributes:
        rank: this one's.
        size: how many there are.
        group: over which they talk; None for the world's.
        guard: names the rank that fails.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    guard: FailureGuard = no_guard

    @classmethod
    def of(cls, context: ParallelContext, group: dist.ProcessGroup | None = None) -> Ranks:
        """Those of a context. A collective follows on every use: all ranks take part."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), group, context.guard)

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.size == 1

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with self.guard("world exchange"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.alone:
            return value
        box = [value]
        with self.guard("world exchange"):
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def together(self, action: Callable[[], T], what: str, kind: type[PolyshardError] = CheckpointError) -> T:
        """Run `action` on every rank; if it fails on any, raise an error on all that names the rank. A collective.

        Args:
            action: of this rank. It may not communicate: a rank in which it fails would leave the others waiting.
            what: beginning of the message, such as "the save failed".
            kind: of the error, unless all ranks that failed raised the same `PolyshardError`.
        """
        error: Exception | None = None
        results: list[T] = []
        try:
            results.append(action())
        except Exception as problem:
            error = problem
        self.agree(error, what, kind)
        return results[0]

    def agree(self, error: Exception | None, what: str, kind: type[PolyshardError] = CheckpointError) -> None:
        """Raise an error of this kind on every rank where any has one, naming the rank."""
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return
        if self.alone:
            assert error is not None
            if isinstance(error, PolyshardError):
                raise error
            failed = [str(error)]
        elif isinstance(error, PolyshardError) and len({text for text in texts if text}) == 1:
            raise error  # all that failed say the same
        raise kind(f"{what}: {'; '.join(failed)}") from error
