"""This process's position in the parallel layout, as passed to model factories and layer constructors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed import ProcessGroup

from polyshard.core.attention import AttentionFactory, LatentFactory
from polyshard.core.errors import ConfigurationError
from polyshard.core.exact_mode import ExactMode
from polyshard.core.parallel_layout import AXES, Axis, ParallelLayout
from polyshard.core.weight_sharding import WeightLayout


@runtime_checkable
class Collectives(Protocol):
    """Collectives of one process group, without autograd: the layers implement their own backward passes.

    No method modifies its input. A server provides its own implementation (custom all-reduce, shared memory); training
    uses torch.distributed.

    Examples:
        The smallest implementation, for a group of one rank:

        >>> class OneRank:
        ...     def all_reduce(self, tensor, op="sum"): return tensor.clone()
        ...     def all_gather(self, tensor, dim): return tensor.clone()
        ...     def reduce_scatter(self, tensor, dim): return tensor.clone()
        >>> isinstance(OneRank(), Collectives)
        True
    """

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return the elementwise `sum` or `max` over the group, as a new tensor."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate the tensors of all ranks along `dim`, in group order."""
        ...

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's slice, along `dim`, of the elementwise sum over the group."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelAxis:
    """One axis of the parallel layout, seen from this process.

    Attributes:
        name: the axis.
        ranks: global ranks of this process's group, in order along the axis.
        rank: this process's position in `ranks`.
        group: the process group; may be None if the axis has one rank.
        collectives: the collectives of this group; None if the axis has one rank.

    Examples:
        >>> ParallelAxis(name="tensor", ranks=(4, 5), rank=1).size
        2
    """

    name: Axis
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    group: ProcessGroup | None = None
    collectives: Collectives | None = None

    @property
    def size(self) -> int:
        """The number of ranks along this axis."""
        return len(self.ranks)


def replica_axis(parallel_context: ParallelContext) -> ParallelAxis:
    """Return the axis of the ranks that hold the same weights: the data and the context axis together.

    Gradients are averaged over these ranks, and ZeRO shards its states over them.
    """
    return parallel_context.axis("data" if parallel_context.axis("context").size == 1 else "replica")


def holder_axis(parallel_context: ParallelContext, layout: WeightLayout) -> ParallelAxis:
    """Return the axis of the ranks that hold the same shard of a weight: of experts, a part of the replica axis."""
    if layout.experts is None or parallel_context.axis("expert").size == 1:
        return replica_axis(parallel_context)
    return parallel_context.axis("expert_replica")


class FailureGuard(Protocol):
    """A wrapper around communication that reports which rank failed and when."""

    def __call__(self, operation: str) -> AbstractContextManager[None]:
        """Return a context manager that turns a backend's error into `RankFailureError`."""
        ...


def no_guard(operation: str) -> AbstractContextManager[None]:
    """Return a context manager that does nothing: the guard of a single process."""
    del operation
    return nullcontext()


class BackgroundWork(Protocol):
    """Work of this rank in the background, such as a save."""

    def join(self) -> None:
        """Return when the work has ended, with or without success."""
        ...

    def wait(self) -> object:
        """Return when the work has ended, or raise its error."""
        ...


@runtime_checkable
class ParallelContext(Protocol):
    """This process's position in the parallel layout: the second argument of every model factory.

    The context is data and builds no layers itself. `polyshard.initialize` returns one; `GroupContext` is the
    implementation that all built-in adapters return.

    Examples:
        >>> context = ps.initialize("torch")
        >>> isinstance(context, ParallelContext)
        True
        >>> context.axis("tensor").size, context.get_tensor_parallel_rank()
        (1, 0)
    """

    @property
    def layout(self) -> ParallelLayout:
        """The sizes of all axes."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which this process computes and on which its layers are created."""
        ...

    @property
    def linear(self) -> Any:
        """The `LinearAdapter` that builds this context's layers unless a layer names another."""
        ...

    @property
    def initialize_weights(self) -> bool:
        """Whether layers initialize their weights when they are built; a server loads them instead."""
        ...

    @property
    def attention(self) -> AttentionFactory | None:
        """The factory of attention cores over a server's paged KV cache; None in training."""
        ...

    @property
    def latent_attention(self) -> LatentFactory | None:
        """The factory of cores for multi-head latent attention over a server's cache of latents; None without one."""
        ...

    @property
    def exact(self) -> ExactMode | None:
        """The operators of exact mode; None in the ordinary mode."""
        ...

    @property
    def pipeline_layers(self) -> Callable[[int, int, int], tuple[int, int]] | None:
        """A server's own pipeline split, `(layers, stage, stages) -> (first, one past the last)`; None without one."""
        ...

    @property
    def guard(self) -> FailureGuard:
        """A wrapper for communication outside of layers (training engines, checkpoints) that names a failed rank."""
        ...

    @property
    def group_timeout(self) -> float:
        """The timeout in seconds of process groups that are created later."""
        ...

    @property
    def background(self) -> list[BackgroundWork]:
        """Work in the background that nobody has waited for; `shutdown` does."""
        ...

    @property
    def on_shutdown(self) -> tuple[Callable[[], None], ...]:
        """The functions that undo the initialization, in the order in which they run."""
        ...

    def axis(self, name: Axis) -> ParallelAxis:
        """Return one axis, with its process group and collectives."""
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


def check_context(context: Any, taker: str) -> None:
    """Raise `ConfigurationError` if an argument is no parallel context, for what takes it.

    Examples:
        >>> check_context(ps.initialize("torch"), "StepLoader")
    """
    if not callable(getattr(context, "axis", None)):
        raise ConfigurationError(
            f"The parallel context of {taker} is invalid: got {type(context).__name__}, expected what ps.initialize "
            "returned. Check the order of the arguments."
        )


@dataclass(frozen=True, kw_only=True)
class GroupContext:
    """The `ParallelContext` that all built-in adapters return: plain data over process groups.

    Attributes:
        layout: sizes of all axes.
        device: the device on which this process computes.
        linear: the default `LinearAdapter`.
        axes: the axes by name; an axis that is missing has one rank.
        rank: this process's global rank.
        attention: factory of attention cores over a server's paged KV cache; None in training.
        latent_attention: the same for multi-head latent attention over a cache of latents.
        guard: wraps communication outside of layers (training engines, checkpoints).
        pipeline_layers: a server's own pipeline split, `(layers, stage, stages) -> (first, one past the last)`.
        initialize_weights: whether layers initialize their weights when built; a server loads them instead.
        group_timeout: timeout in seconds of process groups that are created later.
        exact: the operators of exact mode, with which the forward pass gives the same bits as the server's; None in
            the ordinary mode.
        background: work in the background that nobody has waited for; `shutdown` does.
        on_shutdown: functions that undo the initialization, in order.

    Examples:
        >>> layout, device = ps.ParallelLayout(), torch.device("cpu")
        >>> context = GroupContext(layout=layout, device=device, linear=ps.load_adapter("torch").linear)
        >>> ps.column_parallel(4, 8, context)(torch.ones(2, 4)).shape
        torch.Size([2, 8])
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
    background: list[BackgroundWork] = field(default_factory=list, compare=False, repr=False)
    on_shutdown: tuple[Callable[[], None], ...] = ()

    def axis(self, name: Axis) -> ParallelAxis:
        """Return one axis; an axis that is missing from `axes` has one rank.

        Raises:
            ValueError: the axis is unknown.
        """
        if name not in AXES:
            raise ValueError(f"The axis is unknown: got {name!r}, expected one of {', '.join(AXES)}.")
        return self.axes.get(name) or ParallelAxis(name=name, ranks=(self.rank,))

    def get_tensor_parallel_rank(self) -> int:
        """Return this process's position along the tensor axis."""
        return self.axis("tensor").rank

    def get_tensor_parallel_world_size(self) -> int:
        """Return the number of ranks along the tensor axis."""
        return self.axis("tensor").size

    def get_tensor_parallel_group(self) -> ProcessGroup | None:
        """Return the process group of the tensor axis, or None without one."""
        return self.axis("tensor").group

    def get_pipeline_parallel_rank(self) -> int:
        """Return this process's position along the pipeline axis."""
        return self.axis("pipeline").rank

    def get_pipeline_parallel_world_size(self) -> int:
        """Return the number of ranks along the pipeline axis."""
        return self.axis("pipeline").size

    def get_pipeline_parallel_group(self) -> ProcessGroup | None:
        """Return the process group of the pipeline axis, or None without one."""
        return self.axis("pipeline").group

    def get_data_parallel_rank(self) -> int:
        """Return this process's position along the data axis."""
        return self.axis("data").rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of ranks along the data axis."""
        return self.axis("data").size

    def get_data_parallel_group(self) -> ProcessGroup | None:
        """Return the process group of the data axis, or None without one."""
        return self.axis("data").group

    def get_context_parallel_rank(self) -> int:
        """Return this process's position along the context axis."""
        return self.axis("context").rank

    def get_context_parallel_world_size(self) -> int:
        """Return the number of ranks along the context axis."""
        return self.axis("context").size

    def get_context_parallel_group(self) -> ProcessGroup | None:
        """Return the process group of the context axis, or None without one."""
        return self.axis("context").group

    def get_expert_parallel_rank(self) -> int:
        """Return this process's position along the expert axis."""
        return self.axis("expert").rank

    def get_expert_parallel_world_size(self) -> int:
        """Return the number of ranks along the expert axis."""
        return self.axis("expert").size

    def get_expert_parallel_group(self) -> ProcessGroup | None:
        """Return the process group of the expert axis, or None without one."""
        return self.axis("expert").group
