"""One attention call on this rank's tensors: selects the kernel and builds its `AttentionCall`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.attention.kernels.softmax import wide
from polyshard.attention.selection import kernel_named, select_kernel
from polyshard.core.attention import AttentionSpec, PackedSequences


def run_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: PackedSequences,
    spec: AttentionSpec,
    training: bool,
    name: str | None,
    *,
    sinks: torch.Tensor | None = None,
    keys: PackedSequences | None = None,
) -> torch.Tensor:
    """Compute attention with the fastest kernel.

    Args:
        q: `[query tokens, heads, head_dim]`.
        k: `[key tokens, kv_heads, head_dim]`.
        v: `[key tokens, kv_heads, value_dim]`. Shapes, dtypes and devices are not checked here.
        sequences: boundaries of the queries.
        spec: the request.
        training: whether dropout applies.
        name: name of the kernel to use; None for the fastest one.
        sinks: `[heads]`; None without sinks.
        keys: boundaries of the keys; default: those of the queries.

    Returns:
        `[query tokens, heads, value_dim]`.
    """
    differentiable = training or (torch.is_grad_enabled() and q.requires_grad)
    if not training and spec.dropout:
        spec = replace(spec, dropout=0.0)
    call = call_of(q, sequences, spec, keys)
    if torch.compiler.is_compiling():
        request = tuple(getattr(spec, field) for field in _FIELDS)
        chosen = kernel_named(_name_of_kernel(request, q.device, q.dtype, differentiable, name))
    else:
        chosen = select_kernel(spec, q.device, q.dtype, differentiable, name)
    return chosen.attend(q, k, v, call, sinks)


def call_of(
    q: torch.Tensor, sequences: PackedSequences, spec: AttentionSpec, keys: PackedSequences | None = None
) -> AttentionCall:
    """Build the `AttentionCall` for `spec`, with a seed if there is dropout."""
    # Drawn from torch's CPU generator, whose state activation checkpointing restores before it recomputes.
    seed = torch.randint(2**62, (), device="cpu") if spec.dropout else None
    slopes = None
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, dtype=wide(q.dtype), device=q.device)
    return AttentionCall(spec=spec, queries=sequences, keys=keys or sequences, alibi_slopes=slopes, seed=seed)


_FIELDS = tuple(field.name for field in fields(AttentionSpec))


@torch.compiler.assume_constant_result  # before torch 2.12 it accepts plain values only, not a frozen dataclass
def _name_of_kernel(
    request: tuple[Any, ...], device: torch.device, dtype: torch.dtype, training: bool, name: str | None
) -> str:
    spec = AttentionSpec(**dict(zip(_FIELDS, request)))
    return select_kernel(spec, device, dtype, training, name).name
