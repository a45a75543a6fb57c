"""Start and end of a training script: `initialize` and `shutdown`."""

from __future__ import annotations

import os
from typing import Any

import torch

from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.environment import deprecated
from polyshard.core.errors import ConfigurationError
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.precision import Precision
from polyshard.core.shutdown import shut_down


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
    precision: Precision | None = None,
    exact_dtype: torch.dtype | None = None,
    **options: Any,
) -> ParallelContext:
    """Create the parallel context of this process, from torchrun's environment or for a single process.

    The data axis gets all ranks that the other axes leave.

    Args:
        adapter: name of the parallelism library.
        tensor: number of ranks that share each layer.
        pipeline: number of stages.
        context: number of ranks that share one sequence.
        expert: number of ranks over which experts are distributed.
        sequence_parallel: shard activations along the sequence between tensor-parallel regions.
        exact: exact mode: the forward pass equals, bit for bit, that of a server registered with `exact=True`. Needs
            vLLM.
        exact_shards: number of partial products that a row-parallel layer is summed from in exact mode: a multiple of
            the tensor-parallel sizes of trainer and server, equal on both; `tensor` by default.
        precision: in exact mode, dtypes of the run: `Precision(compute=torch.bfloat16)` for float32 parameters and a
            server in bfloat16. Without exact mode, pass it to the engine instead.
        exact_dtype: deprecated; `precision=Precision(compute=exact_dtype)`.
        options: options of the adapter, such as `device` and `timeout` (seconds).

    Raises:
        AdapterError: there is no such adapter, or it does not support the request.
        ConfigurationError: options of exact mode are set without it, or the dtype is not one that servers use.
        LayoutError: the sizes do not match the number of processes.

    Examples:
        >>> context = ps.initialize("torch", device="cpu")
        >>> context.layout.world_size, context.device
        (1, device(type='cpu'))
        >>> ps.shutdown(context)
    """
    layout = ParallelLayout.for_world(
        int(os.environ.get("WORLD_SIZE", "1")),
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        expert=expert,
        sequence_parallel=sequence_parallel,
    )
    if exact_dtype is not None:
        deprecated("exact_dtype=", "precision=Precision(compute=...)")
        precision = Precision(compute=exact_dtype)
    if not exact and exact_shards is not None:
        raise ConfigurationError("exact_shards requires exact mode. Add exact=True.")
    if not exact and precision is not None:
        raise ConfigurationError(
            "precision= of initialize requires exact mode. Add exact=True, or pass precision= to the engine."
        )
    made = load_adapter(adapter).initialize(layout, **options)
    if not exact:
        return made
    from polyshard.exact import exact_context

    return exact_context(made, shards=exact_shards, precision=precision)


def shutdown(parallel_context: ParallelContext) -> None:
    """Wait for all ranks, and destroy what `initialize` created; `initialize` may then be called again.

    Saves in the background are waited for first. While an exception is handled, as in a `finally` block, the wait for
    the other ranks is short, because they may be waiting elsewhere; they learn which error this rank raised.

    Raises:
        CheckpointError: a save in the background failed.
        RankFailureError: a rank crashed, hung, or cannot be reached.

    Examples:
        >>> context = ps.initialize("torch")
        >>> ps.shutdown(context)
    """
    shut_down(parallel_context)
