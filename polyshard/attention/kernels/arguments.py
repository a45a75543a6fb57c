"""Conversion between an `AttentionCall` and the flat arguments of a custom operator: tensors and plain values."""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch

from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec, PackedSequences


class TensorArguments(NamedTuple):
    """The tensors of a call besides q, k and v. Key boundaries are None if they equal those of the queries."""

    cu_queries: torch.Tensor
    host_queries: torch.Tensor
    cu_keys: torch.Tensor | None
    host_keys: torch.Tensor | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    seed: torch.Tensor | None


class Settings(NamedTuple):
    """The plain values of a call, and the name of its kernel."""

    kernel: str
    scale: float
    causal: bool
    sliding_window: int | None
    softcap: float | None
    dropout: float
    head_offset: int
    differentiable: bool


class Arguments(NamedTuple):
    """The arguments of the operator after q, k and v."""

    tensors: TensorArguments
    settings: Settings

    def flat(self) -> tuple[Any, ...]:
        """Return the arguments in the operator's order."""
        return (*self.tensors, *self.settings)


def schema() -> str:
    """Return the operator schema of the arguments, in the order of `Arguments.flat`."""
    names = {torch.Tensor: "Tensor", str: "str", float: "float", bool: "bool", int: "SymInt"}

    def declared(hint: Any) -> str:
        optional = next((kind for kind in names if hint == kind | None), None)
        return names[hint] if optional is None else f"{names[optional]}?"

    fields = {**get_type_hints(TensorArguments), **get_type_hints(Settings)}
    return ", ".join(f"{declared(hint)} {name}" for name, hint in fields.items())


def pack(kernel: str, call: AttentionCall, sinks: torch.Tensor | None, differentiable: bool) -> Arguments:
    """Convert a call to arguments of the operator."""
    spec, shared = call.spec, call.keys is call.queries
    tensors = TensorArguments(
        cu_queries=call.queries.cu_seqlens,
        host_queries=call.queries.host,
        cu_keys=None if shared else call.keys.cu_seqlens,
        host_keys=None if shared else call.keys.host,
        sinks=sinks,
        alibi_slopes=call.alibi_slopes,
        seed=call.seed,
    )
    settings = Settings(
        kernel=kernel,
        scale=spec.scale,
        causal=spec.causal,
        sliding_window=spec.sliding_window,
        softcap=spec.softcap,
        dropout=spec.dropout,
        head_offset=spec.head_offset,
        differentiable=differentiable,
    )
    return Arguments(tensors, settings)


def named(flat: tuple[Any, ...]) -> Arguments:
    """Convert the operator's flat arguments after q, k and v to named fields."""
    count = len(TensorArguments._fields)
    return Arguments(TensorArguments(*flat[:count]), Settings(*flat[count:]))


def unpack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: Arguments) -> AttentionCall:
    """Convert arguments of the operator back to a call. Head counts and sizes are those of q, k and v."""
    tensors, settings = arguments
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        scale=settings.scale,
        causal=settings.causal,
        sliding_window=settings.sliding_window,
        softcap=settings.softcap,
        dropout=settings.dropout,
        head_offset=settings.head_offset,
    )
    queries = PackedSequences(tensors.cu_queries, tensors.host_queries)
    keys = queries
    if tensors.cu_keys is not None and tensors.host_keys is not None:
        keys = PackedSequences(tensors.cu_keys, tensors.host_keys)
    return AttentionCall(
        spec=spec,
        queries=queries,
        keys=keys,
        alibi_slopes=tensors.alibi_slopes,
        seed=tensors.seed,
        sinks=tensors.sinks,
        save=settings.differentiable and tensors.sinks is None,
        logsumexp=settings.differentiable or tensors.sinks is not None,
    )
