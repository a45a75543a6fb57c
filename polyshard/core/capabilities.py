"""The features that an adapter supports, as data. Test skips, documentation tables and errors derive from them.

An unsupported feature has a reason and one of three categories, as in ibis: `notimpl` (polyshard has not implemented
it), `notyet` (the library does not offer it yet), `never` (it is impossible).
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
    "expert": "expert parallel (a mixture of experts distributed over the data axis)",
    "casts": "float32 parameters with computation in bfloat16",
    "masters": "bfloat16 parameters with float32 masters in the optimizer",
    "float16": "computation in float16 with dynamic loss scaling",
    "float8": "matrix products of tensor-parallel layers in float8",
    "optimizers": "elementwise optimizers of torch besides AdamW",
    "offload": "optimizer state and update on the CPU, with parameters on a GPU",
    "compile": "torch.compile of a model's blocks in training",
    "lora": "LoRA (low-rank matrices beside frozen weights)",
    "cpu": "CPU with gloo",
    "cuda": "CUDA with NCCL",
    "training": "training (forward and backward pass)",
    "serving": "serving (layers inside a vLLM engine, on that engine's process groups)",
}


@dataclass(frozen=True, slots=True)
class Support:
    """Whether one feature is available; if not, why.

    Attributes:
        available: whether the feature can be used.
        reason: why it is not available; of an available feature, what part of the library provides it, or nothing.
        whose: the category of the reason: `notimpl`, `notyet` or `never`.
        without: features with which this one cannot be combined.

    Raises:
        ValueError: an unavailable feature without a reason or a category.

    Examples:
        >>> Support(False, "FairScale has no sequence parallel", "never").available
        False
    """

    available: bool
    reason: str = ""
    whose: Whose | None = None
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.available and not (self.reason and self.whose):
            raise ValueError(
                f"An unavailable capability is incomplete: got reason {self.reason!r} and category {self.whose!r}, "
                "expected a reason and one of notimpl, notyet, never."
            )


YES = Support(True)


def no(whose: Whose, reason: str) -> Support:
    """Return the `Support` of an unavailable feature.

    Examples:
        >>> no("notyet", "the library has no ZeRO stage 3")
        Support(available=False, reason='the library has no ZeRO stage 3', whose='notyet', without=())
    """
    return Support(False, reason, whose)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The support of one adapter for every feature in `FEATURES`.

    Attributes:
        owner: the adapter's name.
        support: the `Support` of each feature.

    Raises:
        ValueError: a feature is unknown or missing.

    Examples:
        >>> capabilities = ps.load_adapter("torch").capabilities
        >>> capabilities["fsdp"].available
        True
        >>> capabilities.require("tensor")  # raises AdapterError if the adapter lacks the feature
    """

    owner: str
    support: Mapping[str, Support] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.support) - set(FEATURES))
        unanswered = sorted(set(FEATURES) - set(self.support))
        if unknown or unanswered:
            raise ValueError(
                f"The capabilities of {self.owner!r} are incomplete: unexpected {unknown}, missing {unanswered}."
            )

    def __getitem__(self, feature: str) -> Support:
        return self.support[feature]

    def __iter__(self) -> Iterator[tuple[str, Support]]:
        return iter(self.support.items())

    def require(self, feature: str) -> None:
        """Raise `AdapterError`, with the recorded reason, if the feature is not available."""
        answer = self.support[feature]
        if not answer.available:
            raise AdapterError(
                f"Adapter {self.owner!r} does not support {FEATURES[feature]}: {answer.reason} ({answer.whose})."
            )


@dataclass(frozen=True, slots=True)
class Accepted:
    """A candidate (kernel or adapter) that supports a request."""

    name: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that does not support a request, with the reason.

    Examples:
        >>> str(Rejected("flash_attn_2", "needs CUDA, not cpu"))
        'flash_attn_2: needs CUDA, not cpu'
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
