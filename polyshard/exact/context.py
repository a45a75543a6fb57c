"""The parallel context of a trainer in exact mode."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.environment import deprecated
from polyshard.core.errors import AdapterError, ConfigurationError, LayoutError
from polyshard.core.exact_mode import ExactMode, ExactOperators
from polyshard.core.precision import Precision
from polyshard.exact.linear import ExactLinearAdapter, ExactReplicatedLinear, OnBuilt
from polyshard.exact.rotary import exact_rotate
from polyshard.exact.sigmoid import exact_sigmoid

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def exact_context(
    parallel_context: ParallelContext,
    *,
    shards: int | None = None,
    precision: Precision | None = None,
    compute_dtype: torch.dtype | None = None,
) -> GroupContext:
    """Return the context in exact mode, for models that equal, bit for bit, a server registered with `exact=True`.

    Args:
        parallel_context: a context of any training adapter.
        shards: number of partial products that a row-parallel layer is summed from: a multiple of the tensor-parallel
            sizes of trainer and server, equal on both; this context's tensor-parallel size by default.
        precision: dtypes of the run; its `compute` is the server's dtype. Default: the dtype of the parameters.
        compute_dtype: deprecated; `precision=Precision(compute=compute_dtype)`.

    Raises:
        LayoutError: `shards` is not a multiple of the tensor-parallel size.
        ConfigurationError: the dtype of computation is not one that servers use, or the context axis uses ring
            attention.
        AdapterError: no serving engine with exact operators is installed.

    Examples:
        >>> context = ps.exact_context(ps.initialize("torch"), shards=2)
        >>> context.exact.shards
        2
    """
    if not isinstance(parallel_context, GroupContext):
        raise AdapterError(f"exact mode needs a polyshard.GroupContext: got {type(parallel_context).__name__}")
    if compute_dtype is not None:
        deprecated("compute_dtype=", "precision=Precision(compute=...)")
        precision = Precision(compute=compute_dtype)
    if precision is not None and precision.compute_dtype not in _SERVED:
        raise ConfigurationError(
            f"precision is invalid for exact mode: got compute={precision.compute_dtype}, expected float32, bfloat16 "
            "or float16"
        )
    if precision is not None and precision.float8 is not None:
        raise ConfigurationError(
            f"precision is invalid for exact mode: got float8={precision.float8!r}, expected None. The server computes "
            "no matrix products in float8."
        )
    mode = exact_mode(
        check_shards(shards, parallel_context.layout.tensor),
        server_operators(parallel_context.device),
        precision.compute_dtype if precision is not None and precision.casts else None,
    )
    return replace(parallel_context, exact=mode)


def exact_mode(
    shards: int,
    operators: ExactOperators,
    compute_dtype: torch.dtype | None = None,
    on_built: OnBuilt = lambda layer: None,
) -> ExactMode:
    """Return exact mode as data, with the adapter that wraps the layers of any library."""

    def wrap_adapter(adapter: Any) -> Any:
        return adapter if isinstance(adapter, ExactLinearAdapter) else ExactLinearAdapter(adapter, mode, on_built)

    def replicated_linear(layer: nn.Linear, context: ParallelContext, dtype: torch.dtype | None = None) -> nn.Module:
        exact = ExactReplicatedLinear(layer, context, mode, dtype)
        on_built(exact)
        return exact

    mode = ExactMode(
        shards=shards,
        operators=operators,
        wrap_adapter=wrap_adapter,
        replicated_linear=replicated_linear,
        sigmoid=exact_sigmoid,
        rotate=partial(exact_rotate, operators),
        compute_dtype=compute_dtype,
    )
    return mode


def check_shards(shards: int | None, tensor: int) -> int:
    """Return the number of shards, the tensor-parallel size by default.

    Raises:
        LayoutError: the number is not a multiple of the tensor-parallel size.
    """
    if shards is None:
        return tensor
    if not isinstance(shards, int) or isinstance(shards, bool) or shards < 1 or shards % tensor:
        raise LayoutError(
            f"exact_shards is invalid: got {shards!r}, expected a multiple of the tensor-parallel size {tensor}. Pass "
            "the same value to trainer and server."
        )
    return shards


def server_operators(device: torch.device) -> ExactOperators:
    """Return the operators of the installed serving engine.

    Raises:
        AdapterError: no adapter has exact operators.
    """
    for name in adapter_names():
        make = getattr(load_adapter(name), "exact_operators", None)
        if make is not None:
            return make(device)
    raise AdapterError("exact mode needs the operators of a serving engine, but no adapter has any. Install vLLM.")
