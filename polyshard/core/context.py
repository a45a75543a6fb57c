"""Where a process stands: information that a model factory is given, and that layers are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed import ProcessGroup

from polyshard.core.attention import AttentionFactory, LatentFactory
from polyshard.core.exact_mode import ExactMode
from polyshard.core.layout import AXES, Axis, ParallelLayout


@runtime_checkable
class Collectives(Protocol):
    """Forward-only collectives of one group; autograd is the layers' affair. Inputs are left untouched.

    A serving engine brings its own (custom all-reduce, shared memory); training uses torch.distributed.
    """

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Elementwise `sum` or `max` over the group, as a new tensor."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenation over the group, in group order, along `dim`."""
        ...

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part, along `dim`, of the elementwise sum over the group."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelAxis:
    """One axis seen from this process.

    Attributes:
        ranks: global ranks of this process's group, in order along the axis.
        rank: this process's position in `ranks`.
        group: the process group; may be None where the axis has one rank.
        collectives: how this group communicates; None where the axis has one rank.
    """

    name: Axis
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: ProcessGroup | None = None
    collectives: Collectives | None = None

    @property
    def size(self) -> int:
        """Number of ranks along this axis."""
        return len(self.ranks)


def replica_axis(parallel_context: ParallelContext) -> ParallelAxis:
    """The ranks that hold the same weights: those of the data and the context axis together.

    Gradients are averaged, and ZeRO shards, over them.
    """
    return parallel_context.axis("data" if parallel_context.axis("context").size == 1 else "replica")


class FailureGuard(Protocol):
    """Wraps a piece of communication, so that its failure names the rank and the time."""

    def __call__(self, operation: str) -> AbstractContextManager[None]:
        """A context manager that turns a backend's error into `RankFailureError`."""
        ...


def no_guard(operation: str) -> AbstractContextManager[None]:
    """The guard of a process that stands alone."""
    del operation
    return nullcontext()


@runtime_checkable
class ParallelContext(Protocol):
    """What a model factory receives beside its config. It makes no layers itself."""

    @property
    def layout(self) -> ParallelLayout:
        """Sizes of all axes."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        ...

    @property
    def linear(self) -> Any:
        """Whose layers this context builds by default (a `LinearAdapter`)."""
        ...

    @property
    def initialize_weights(self) -> bool:
        """Whether layers fill their weights when built; a server loads them instead."""
        ...

    @property
    def attention(self) -> AttentionFactory | None:
        """Makes the attention core of a serving engine, over its paged KV cache; None in training."""
        ...

    @property
    def latent_attention(self) -> LatentFactory | None:
        """The same of latent attention, over a cache of latents."""
        ...

    @property
    def exact(self) -> ExactMode | None:
        """The operators of exact mode; None without it."""
        ...

    @property
    def pipeline_layers(self) -> Callable[[int, int, int], tuple[int, int]] | None:
        """`(layers, stage, stages) -> (first, one past the last)` of an engine that cuts by itself; else None."""
        ...

    @property
    def guard(self) -> FailureGuard:
        """Wraps communication outside of layers (a training engine's, a checkpoint's), so that failures are named."""
        ...

    @property
    def group_timeout(self) -> float:
        """Seconds, for further process groups."""
        ...

    @property
    def on_shutdown(self) -> tuple[Callable[[], None], ...]:
        """Functions that undo the initialization, in order."""
        ...

    def axis(self, name: Axis) -> ParallelAxis:
        """One axis, with its group and collectives."""
        ...

    def get_tensor_parallel_rank(self) -> int: ...  # noqa: D102
    def get_tensor_parallel_world_size(self) -> int: ...  # noqa: D102
    def get_tensor_parallel_group(self) -> ProcessGroup | None: ...  # noqa: D102
    def get_pipeline_parallel_rank(self) -> int: ...  # noqa: D102
    def get_pipeline_parallel_world_size(self) -> int: ...  # noqa: D102
    def get_pipeline_parallel_group(self) -> ProcessGroup | None: ...  # noqa: D102
    def get_data_parallel_rank(self) -> int: ...  # noqa: D102
    def get_data_parallel_world_size(self) -> int: ...  # noqa: D102
    def get_data_parallel_group(self) -> ProcessGroup | None: ...  # noqa: D102
    def get_context_parallel_rank(self) -> int: ...  # noqa: D102
    def get_context_parallel_world_size(self) -> int: ...  # noqa: D102
    def get_context_parallel_group(self) -> ProcessGroup | None: ...  # noqa: D102
    def get_expert_parallel_rank(self) -> int: ...  # noqa: D102
    def get_expert_parallel_world_size(self) -> int: ...  # noqa: D102
    def get_expert_parallel_group(self) -> ProcessGroup | None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class GroupContext:
    """The `ParallelContext` that all built-in adapters hand out: plain data over process groups.

    Attributes:
        attention: makes the attention core where an engine brings its own (a paged KV cache); None in training.
        latent_attention: the same of latent attention over a cache of latents.
        guard: wraps communication that is not a layer's (a training engine's, a checkpoint's).
        on_shutdown: what undoes the initialisation, in order.
        pipeline_layers: `(layers, stage, stages) -> (first, one past the last)` where an engine cuts by itself.
        initialize_weights: whether layers fill their weights when built; a server loads them instead.
        group_timeout: seconds, for further process groups.
        exact: set in exact mode: every operator of the forward gives the bits of the other side.
    """

    layout: ParallelLayout
    device: torch.device
    linear: Any
    axes: Mapping[Axis, ParallelAxis] = field(default_factory=dict)
    rank: int = 0
    attention: AttentionFactory | None = None
    latent_attention: LatentFactory | None = None
    guard: FailureGuard = no_guard
    pipeline_layers: Callable[[int, int, int], tuple[int, int]] | None = None
    initialize_weights: bool = True
    group_timeout: float = 600.0
    exact: ExactMode | None = None
    on_shutdown: tuple[Callable[[], None], ...] = ()

    def axis(self, name: Axis) -> ParallelAxis:
        """One axis; of one rank where it was not given."""
        if name not in AXES:
            raise ValueError(f"unknown axis {name!r}; expected one of {', '.join(AXES)}")
        return self.axes.get(name) or ParallelAxis(name=name, ranks=(self.rank,))

    def get_tensor_parallel_rank(self) -> int:
        """Position along the tensor axis."""
        return self.axis("tensor").rank

    def get_tensor_parallel_world_size(self) -> int:
        """Ranks along the tensor axis."""
        return self.axis("tensor").size

    def get_tensor_parallel_group(self) -> ProcessGroup | None:
        """Group of the tensor axis."""
        return self.axis("tensor").group

    def get_pipeline_parallel_rank(self) -> int:
        """Position along the pipeline axis."""
        return self.axis("pipeline").rank

    def get_pipeline_parallel_world_size(self) -> int:
        """Ranks along the pipeline axis."""
        return self.axis("pipeline").size

    def get_pipeline_parallel_group(self) -> ProcessGroup | None:
        """Group of the pipeline axis."""
        return self.axis("pipeline").group

    def get_data_parallel_rank(self) -> int:
        """Position along the data axis."""
        return self.axis("data").rank

    def get_data_parallel_world_size(self) -> int:
        """Ranks along the data axis."""
        return self.axis("data").size

    def get_data_parallel_group(self) -> ProcessGroup | None:
        """Group of the data axis."""
        return self.axis("data").group

    def get_context_parallel_rank(self) -> int:
        """Position along the context axis."""
        return self.axis("context").rank

    def get_context_parallel_world_size(self) -> int:
        """Ranks along the context axis."""
        return self.axis("context").size

    def get_context_parallel_group(self) -> ProcessGroup | None:
        """Group of the context axis."""
        return self.axis("context").group

    def get_expert_parallel_rank(self) -> int:
        """Position along the expert axis."""
        return self.axis("expert").rank

    def get_expert_parallel_world_size(self) -> int:
        """Ranks along the expert axis."""
        return self.axis("expert").size

    def get_expert_parallel_group(self) -> ProcessGroup | None:
        """Group of the expert axis."""
        return self.axis("expert").group
