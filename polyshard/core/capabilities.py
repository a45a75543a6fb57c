"""What an adapter or a kernel can do, as data: one source for skips, tables in the docs, and errors.

The vocabulary of a 'no' is that of ibis: `notimpl` is ours to do, `notyet` waits for the library, `never`
cannot be, and the reason says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from polyshard.core.errors import AdapterError

Whose = Literal["notimpl", "notyet", "never"]

FEATURES: Mapping[str, str] = {
    "tensor": "tensor-parallel layers",
    "sequence": "sequence parallel (activations sharded between tensor-parallel regions)",
    "data": "data parallel with replicated weights",
    "fsdp": "weights, gradients and optimizer states sharded over the data axis",
    "zero1": "optimizer states sharded over the data axis",
    "zero2": "optimizer states and gradients sharded over the data axis",
    "zero3": "ZeRO stage 3",
    "pipeline": "pipeline parallel",
    "context": "context parallel (one sequence over several ranks)",
    "expert": "expert parallel",
    "casts": "float32 parameters with computation in bfloat16",
    "masters": "bfloat16 parameters with float32 masters in the optimizer",
    "float16": "computation in float16 with dynamic loss scaling",
    "cpu": "runs on CPU with gloo",
    "cuda": "runs on CUDA with NCCL",
    "training": "forward and backward",
    "serving": "its layers run inside a serving engine on that engine's groups",
}


@dataclass(frozen=True, slots=True)
class Support:
    """One capability: available, or not with the reason and whose it is."""

    available: bool
    reason: str = ""
    whose: Whose | None = None

    def __post_init__(self) -> None:
        if not self.available and not (self.reason and self.whose):
            raise ValueError("an unavailable capability needs a reason and whose it is (notimpl, notyet, never)")


YES = Support(True)


def no(whose: Whose, reason: str) -> Support:
    """A 'no' with its reason."""
    return Support(False, reason, whose)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The answer to every name in `FEATURES` for one adapter.

    Raises:
        ValueError: a feature is unknown or unanswered.
    """

    owner: str
    support: Mapping[str, Support] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.support) - set(FEATURES))
        unanswered = sorted(set(FEATURES) - set(self.support))
        if unknown or unanswered:
            raise ValueError(f"capabilities of {self.owner!r}: unknown {unknown}, unanswered {unanswered}")

    def __getitem__(self, feature: str) -> Support:
        return self.support[feature]

    def __iter__(self) -> Iterator[tuple[str, Support]]:
        return iter(self.support.items())

    def require(self, feature: str) -> None:
        """Raise `AdapterError` with the recorded reason where the feature is not available."""
        answer = self.support[feature]
        if not answer.available:
            raise AdapterError(f"adapter {self.owner!r} has no {FEATURES[feature]}: {answer.reason} ({answer.whose})")


@dataclass(frozen=True, slots=True)
class Accepted:
    """A candidate (kernel, adapter) that can do what was asked."""

    name: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that cannot, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
