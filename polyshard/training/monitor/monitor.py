"""The monitor of a run: measures phases, collects the figures of a step over ranks, and gives them to the sinks."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from polyshard.core.adapter import StepResult
from polyshard.core.batch import BatchResult, MicroBatch
from polyshard.core.context import ParallelAxis, ParallelContext, replica_axis
from polyshard.core.errors import ConfigurationError
from polyshard.core.ranks import Ranks
from polyshard.training.monitor.flops import sequence_lengths
from polyshard.training.monitor.peak import synchronize
from polyshard.training.monitor.record import PHASES, Phase, Sink, StepRecord

T = TypeVar("T")


class Monitor:
    """Measure the steps of a run, and give a `StepRecord` of each to the sinks of rank 0.

    Args:
        parallel_context: the parallel context.
        sinks: functions of a record, such as `JsonLines`, `TensorBoard` and `ProgressBar`; only rank 0 calls them.
        flops: FLOPs of sequences of the given lengths, such as `model_flops(engine)`; None does not count them.
        peak_flops: FLOPs per second of one device, for the utilization: `known_peak_flops`, `measured_peak_flops`, or
            your own figure; None leaves it out.

    Examples:
        >>> context = ps.initialize("torch")
        >>> with Monitor(context, [lambda record: print(record.step, sorted(record.seconds))]) as monitor:
        ...     with monitor.phase("forward_backward"):
        ...         pass
        ...     record = monitor.record(1, [{"input_ids": torch.ones(2, 8)}])
        1 ['data', 'forward_backward', 'other', 'save', 'step']
        >>> record.tokens
        16
    """

    def __init__(
        self,
        parallel_context: ParallelContext,
        sinks: Sequence[Sink] = (),
        *,
        flops: Callable[[Iterable[int]], float] | None = None,
        peak_flops: float | None = None,
    ) -> None:
        if not isinstance(sinks, Sequence) or not all(callable(sink) for sink in sinks):
            raise ConfigurationError(
                f"sinks are invalid: got {sinks!r}, expected a list of functions of a record, such as "
                "[ps.ProgressBar(9)]."
            )
        self._context, self._flops, self._peak = parallel_context, flops, peak_flops
        self._ranks = Ranks.of(parallel_context)
        self._sinks = sinks if self._ranks.rank == 0 else ()
        self._seconds = _no_seconds()
        self._began = time.perf_counter()
        self._inside: Phase | None = None

    def __enter__(self) -> Monitor:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Measure a phase of the step: `"data"`, `"forward_backward"`, `"step"` or `"save"`.

        On a GPU it waits for the device at the end, or the time of its work would be that of a later phase. The
        optimizer's step waits in any case, for the gradient norm.

        Raises:
            ConfigurationError: an unknown phase, or a phase inside of another.
        """
        if name not in PHASES or name == "other" or self._inside is not None:
            raise ConfigurationError(
                f"the phase is invalid: got {name!r} inside of {self._inside!r}, expected one of "
                f"{', '.join(PHASES[:-1])}, outside of another phase."
            )
        self._inside = name
        began = time.perf_counter()
        try:
            yield
            synchronize(self._context.device)
        finally:
            self._seconds[name] += time.perf_counter() - began
            self._inside = None

    def data(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate over a loader, and measure the time that it takes as the phase `"data"`."""
        iterator = iter(loader)
        while True:
            with self.phase("data"):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item  # pyrefly: ignore

    def record(
        self,
        step: int,
        micro_batches: Sequence[MicroBatch] = (),
        result: BatchResult | None = None,
        update: StepResult | None = None,
        *,
        learning_rate: float | None = None,
    ) -> StepRecord:
        """Finish a step: collect its figures over all ranks, and give the record to the sinks. A collective.

        Args:
            step: the number of the step, from 1.
            micro_batches: this rank's micro-batches, as given to `train_batch`.
            result: what `train_batch` returned.
            update: what `step()` returned.
            learning_rate: the learning rate of the step.

        Returns:
            The record, the same on every rank.

        Raises:
            ConfigurationError: a micro-batch has no `input_ids`.
        """
        now = time.perf_counter()
        total, self._began = now - self._began, now
        spent, self._seconds = self._seconds, _no_seconds()
        spent["other"] = max(0.0, total - sum(spent.values()))
        device = self._context.device
        memory = _peak_memory(device)
        longest = self._over_ranks([*spent.values(), total, float(memory)])
        seconds: dict[str, float] = dict(zip(PHASES, longest))
        total, memory = longest[-2], int(longest[-1])
        tokens, flops = self._work(micro_batches)
        utilization = None
        if flops is not None and self._peak:
            utilization = flops / total / (self._peak * self._ranks.size)
        found = StepRecord(
            step=step,
            loss=None if result is None else float(result.loss),
            labels=0 if result is None else int(result.tokens),
            grad_norm=None if update is None else update.grad_norm,
            skipped=update is not None and update.skipped,
            learning_rate=learning_rate,
            tokens=tokens,
            seconds=seconds,
            total_seconds=total,
            tokens_per_second=tokens / total,
            model_flops=flops,
            utilization=utilization,
            memory=memory,
        )
        for sink in self._sinks:
            sink(found)
        return found

    def close(self) -> None:
        """Close the sinks that can be closed."""
        for sink in self._sinks:
            close = getattr(sink, "close", None)
            if callable(close):
                close()

    def _over_ranks(self, figures: list[float]) -> list[float]:
        """Return the largest of each figure over all ranks."""
        values = torch.tensor(figures, dtype=torch.float64, device=self._context.device)
        axes = (self._context.axis("tensor"), self._context.axis("pipeline"), replica_axis(self._context))
        for axis in axes:
            values = self._reduced(values, axis, "max")
        return values.tolist()

    def _work(self, micro_batches: Sequence[MicroBatch]) -> tuple[int, float | None]:
        """Return the input tokens and the FLOPs of a step on all ranks."""
        context = self._context.axis("context").size
        tokens, flops = 0, 0.0
        for micro_batch in micro_batches:
            if "input_ids" not in micro_batch:
                raise ConfigurationError(
                    f"a micro-batch has no input_ids to count: got {', '.join(micro_batch)}. Omit micro_batches."
                )
            tokens += micro_batch["input_ids"].numel()
            if self._flops is not None:
                flops += self._flops(sequence_lengths(micro_batch, context)) / context
        work = torch.tensor([tokens, flops], dtype=torch.float64, device=self._context.device)
        tokens, flops = self._reduced(work, replica_axis(self._context), "sum").tolist()
        return int(tokens), None if self._flops is None else flops

    def _reduced(self, values: torch.Tensor, axis: ParallelAxis, op: str) -> torch.Tensor:
        if axis.size == 1:
            return values
        assert axis.collectives is not None
        return axis.collectives.all_reduce(values, op)


_END: Any = object()


def _no_seconds() -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
