"""A training context in exact mode."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import AdapterError, ConfigurationError, LayoutError
from polyshard.core.exact_mode import ExactMode, ExactOperators
from polyshard.exact.linear import ExactLinearAdapter, ExactWholeLinear, OnBuilt
from polyshard.exact.rotary import exact_rotate


def exact_context(
    parallel_context: ParallelContext,
    *,
    shards: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> GroupContext:
    """The same context in exact mode; a model built with it gives the bits of a server registered with `exact=True`.

    Args:
        parallel_context: of any training adapter.
        shards: how many partial products a row-parallel layer is summed from: a multiple of the tensor-parallel
            sizes of trainer and server, the same on both; default this context's tensor-parallel size.
        compute_dtype: the server's, where the parameters are to stay in float32.

    Raises:
        LayoutError: `shards` is no multiple of the tensor-parallel size.
        ConfigurationError: `compute_dtype` is no dtype of a server; a ring over the context axis.
        AdapterError: no serving engine with exact operators is installed.
    """
    if not isinstance(parallel_context, GroupContext):
        raise AdapterError(f"exact mode needs a polyshard.GroupContext, got {type(parallel_context).__name__}")
    if compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ConfigurationError(f"exact_dtype must be float32, bfloat16 or float16, got {compute_dtype}")
    mode = exact_mode(
        check_shards(shards, parallel_context.layout.tensor), server_operators(parallel_context.device), compute_dtype
    )
    return replace(parallel_context, exact=mode)


def exact_mode(
    shards: int,
    operators: ExactOperators,
    compute_dtype: torch.dtype | None = None,
    on_built: OnBuilt = lambda layer: None,
) -> ExactMode:
    """The mode as data, with the adapter that goes around every library's layers."""

    def wrap_adapter(adapter: Any) -> Any:
        return adapter if isinstance(adapter, ExactLinearAdapter) else ExactLinearAdapter(adapter, mode, on_built)

    def replicated_linear(layer: nn.Linear, context: ParallelContext) -> nn.Module:
        exact = ExactWholeLinear(layer, context, mode)
        on_built(exact)
        return exact

    mode = ExactMode(
        shards=shards,
        operators=operators,
        wrap_adapter=wrap_adapter,
        replicated_linear=replicated_linear,
        rotate=partial(exact_rotate, operators),
        compute_dtype=compute_dtype,
    )
    return mode


def check_shards(shards: int | None, tensor: int) -> int:
    """The number of shards, by default the tensor-parallel size; `LayoutError` where the size does not divide it."""
    if shards is None:
        return tensor
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1 or shards % tensor:
        raise LayoutError(
            f"exact_shards must be a multiple of the tensor-parallel size {tensor}, and the same on trainer and "
            f"server, got {shards!r}"
        )
    return shards


def server_operators(device: torch.device) -> ExactOperators:
    """Those of the installed serving engine.

    Raises:
        AdapterError: no adapter has any.
    """
    for name in adapter_names():
        make = getattr(load_adapter(name), "exact_operators", None)
        if make is not None:
            return make(device)
    raise AdapterError("exact mode computes by a serving engine's operators, and no adapter offers any: install vLLM")
