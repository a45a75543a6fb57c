"""Exchange of small Python objects and of errors between all ranks of a job."""

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
    """All ranks of a job, or a single process.

    Attributes:
        rank: the global rank of this process.
        size: the number of ranks.
        group: the process group for the exchange; None for the world's.
        guard: wraps each exchange, so that an error names the rank that failed.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    guard: FailureGuard = no_guard

    @classmethod
    def of(cls, context: ParallelContext, group: dist.ProcessGroup | None = None) -> Ranks:
        """Return the ranks of a context. Every method that communicates is a collective: all ranks must call it."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), group, context.guard)

    @property
    def is_single(self) -> bool:
        """Whether this is a single process, so that nothing is exchanged."""
        return self.size == 1

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.size
        with self.guard("world exchange"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank."""
        if self.is_single:
            return value
        box = [value]
        with self.guard("world exchange"):
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def run_on_all(self, action: Callable[[], T], what: str, kind: type[PolyshardError] = CheckpointError) -> T:
        """Run `action` on every rank; if it fails on any rank, raise an error that names the rank on all. A collective.

        Args:
            action: this rank's part. It must not communicate: a rank on which it fails would leave the others waiting.
            what: the beginning of the message, such as "the save failed".
            kind: class of the error, unless all ranks that failed raised the same `PolyshardError`.

        Returns:
            The result of this rank's `action`.

        Examples:
            >>> Ranks().run_on_all(lambda: 1 + 1, "the addition failed")
            2
        """
        error: Exception | None = None
        results: list[T] = []
        try:
            results.append(action())
        except Exception as problem:
            error = problem
        self.raise_on_all(error, what, kind)
        return results[0]

    def raise_on_all(self, error: Exception | None, what: str, kind: type[PolyshardError] = CheckpointError) -> None:
        """Raise an error that names the failed ranks on every rank, if `error` is set on any. A collective."""
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return
        if self.is_single:
            assert error is not None
            if isinstance(error, PolyshardError):
                raise error
            failed = [str(error)]
        elif isinstance(error, PolyshardError) and len({text for text in texts if text}) == 1:
            raise error  # all failed ranks have the same message
        raise kind(f"{what}: {'; '.join(failed)}") from error
