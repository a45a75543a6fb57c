"""Dynamic loss scaling for float16: a factor that grows until a gradient overflows, and then shrinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class LossScale:
    """The factor on the loss. Every rank holds the same one: all decide by the norm over all ranks.

    Attributes:
        factor: on the loss; gradients are divided by it before they are used.
        interval: steps without overflow after which it grows.
        steps: since it last changed.

    Source: the rule of `torch.amp.GradScaler` (growth 2, backoff 0.5).
    """

    factor: float
    interval: int = 2000
    steps: int = 0

    def update(self, overflowed: bool) -> None:
        """Take note of one step."""
        self.steps += 1
        if overflowed:
            self.factor, self.steps = max(1.0, self.factor / 2), 0
        elif self.steps == self.interval:
            self.factor, self.steps = self.factor * 2, 0

    def state(self) -> dict[str, float]:
        """Return what a training state stores, as plain JSON."""
        return {"factor": self.factor, "steps": self.steps}

    def load(self, saved: Mapping[str, float]) -> None:
        """Continue from the state of this scaling, or of another library's."""
        self.factor, self.steps = float(saved["factor"]), min(int(saved["steps"]), self.interval - 1)
