"""What a library's ZeRO holds on a rank, for plans of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroElements:
    """Elements on the rank that holds the most, under ZeRO stage 1 or 2.

    Attributes:
        owned: parameters whose optimizer state the rank keeps.
        gradients: gradients, accumulated or in buffers of the library.
        reducing: gradients that are held for a message besides these.
        updating: gradients that are cast to the masters' dtype at once, during an update with masters.
    """

    owned: int
    gradients: int
    reducing: int = 0
    updating: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroQuestion:
    """What a plan knows of a run when it asks an adapter for `ZeroElements`.

    Attributes:
        stage: 1 or 2.
        dense: number of elements of each parameter that all replicas hold, in the model's order.
        expert: the same of parameters that are distributed over the expert axis.
        frozen: elements that are not trained.
        replicas: ranks that hold the dense parameters.
        holders: ranks that hold the same experts.
        micro_batches: of a step.
    """

    stage: int
    dense: Sequence[int]
    expert: Sequence[int]
    frozen: int
    replicas: int
    holders: int
    micro_batches: int


ElementsOf = Callable[[ZeroQuestion], ZeroElements]
