"""The two calls around a training script."""

from __future__ import annotations

import os
from typing import Any

from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.layout import ParallelLayout


def initialize(
    adapter: str = "torch",
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    sequence_parallel: bool = False,
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
        options: the adapter's own, such as `device` and `timeout` (seconds).

    Raises:
        AdapterError: no such adapter, or it cannot do what is asked.
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
    return load_adapter(adapter).initialize(layout, **options)


def shutdown(parallel_context: ParallelContext) -> None:
    """Wait for all ranks, and destroy what `initialize` made; it may then be called again."""
    for undo in getattr(parallel_context, "on_shutdown", ()):
        undo()
