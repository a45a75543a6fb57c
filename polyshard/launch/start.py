"""The two calls around a training script."""

from __future__ import annotations

import os
from typing import Any

import torch

from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import ConfigurationError
from polyshard.core.layout import ParallelLayout


def initialize(
    adapter: str = "torch",
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    sequence_parallel: bool = False,
    exact: bool = False,
    exact_shards: int | None = None,
    exact_dtype: torch.dtype | None = None,
    **options: Any,
) -> ParallelContext:
    """Make the parallel context of this process, from torchrun's environment or alone; data parallel takes the rest.

    Args:
        adapter: the parallelism library, by name.
        tensor: ranks that share each layer.
        pipeline: stages.
        context: ranks that share one sequence.
        expert: ranks over which experts are spread.
        sequence_parallel: shard activations along the sequence between tensor-parallel regions.
        exact: exact mode: a model's forward gives the bits of a server registered with `exact=True`. Needs vLLM.
        exact_shards: from how many partial products a row-parallel layer is summed in exact mode: a multiple of the
            tensor-parallel sizes of trainer and server, the same on both; default `tensor`.
        exact_dtype: the server's dtype in exact mode, where the parameters stay in float32.
        options: the adapter's own, such as `device` and `timeout` (seconds).

    Raises:
        AdapterError: no such adapter, or it cannot do what is asked.
        ConfigurationError: settings of exact mode without it, or a dtype that no server has.
        LayoutError: the sizes do not fit the number of processes.
    """
    layout = ParallelLayout.for_world(
        int(os.environ.get("WORLD_SIZE", "1")),
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=expert,
        sequence_parallel=sequence_parallel,
    )
    if not exact and (exact_shards is not None or exact_dtype is not None):
        raise ConfigurationError("exact_shards and exact_dtype belong to exact mode: add exact=True")
    made = load_adapter(adapter).initialize(layout, **options)
    if not exact:
        return made
    from polyshard.exact import exact_context

    return exact_context(made, shards=exact_shards, compute_dtype=exact_dtype)


def shutdown(parallel_context: ParallelContext) -> None:
    """Wait for all ranks, and destroy what `initialize` made; it may then be called again."""
    for undo in parallel_context.on_shutdown:
        undo()
