"""The figures of one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

Phase = Literal["data", "forward_backward", "step", "save", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """The figures of one training step, over all ranks.

    Attributes:
        step: the number of the step, from 1.
        loss: the mean over all tokens with a label; None if the record has no batch.
        grad_norm: norm of the gradient before clipping; None if the engine does not compute it.
        skipped: whether the step was skipped because a gradient was not finite.
        learning_rate: the learning rate of the step.
        tokens: input tokens, padding included: a sum over data-parallel and context-parallel ranks.
        labels: tokens with a label: a sum over the same ranks.
        seconds: wall time since the record before, by phase: of each phase the longest of all ranks. `"other"` is the
            time outside of every phase.
        total_seconds: wall time since the record before: the longest of all ranks.
        tokens_per_second: `tokens / total_seconds`.
        model_flops: FLOPs that the model needs for the step, on all ranks together; None if they are not counted.
        utilization: model FLOPs per second over the peak of all devices (MFU); None without both figures.
        memory: the largest peak of all ranks, in bytes. On a GPU the peak of torch's allocator in this step; on a CPU
            the peak of the process since it began.

    Examples:
        >>> record = StepRecord(step=1, loss=2.5, tokens=96, total_seconds=0.5, tokens_per_second=192.0)
        >>> record.loss, record.utilization
        (2.5, None)
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    skipped: bool = False
    learning_rate: float | None = None
    tokens: int = 0
    labels: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0
    model_flops: float | None = None
    utilization: float | None = None
    memory: int = 0

    def figures(self) -> dict[str, float]:
        """Return the figures that are known as one flat mapping, for a sink that takes names and numbers.

        Examples:
            >>> StepRecord(step=1, loss=2.5, seconds={"data": 0.1}).figures()["seconds/data"]
            0.1
        """
        found: dict[str, float] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Mapping):
                found.update({f"{each.name}/{name}": float(part) for name, part in value.items()})
            elif value is not None and each.name != "step":
                found[each.name] = float(value)
        return found


# A sink may also have `close()`, which `Monitor.close` calls.
Sink = Callable[[StepRecord], None]
