"""The protocols of attention kernels, and the data of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from polyshard.core.attention import AttentionSpec, PackedSequences


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The arguments of one attention call besides q, k and v.

    Attributes:
        spec: the request; its dropout is 0 outside training.
        queries: boundaries of the packed queries.
        keys: boundaries of the packed keys, for the same number of sequences. If a sequence has more keys than queries,
            its queries are the last tokens (bottom-right alignment, as in flash-attention).
        alibi_slopes: float32 `[heads]` on the device; None without ALiBi.
        seed: int64 scalar on the CPU; None without dropout.
        sinks: `[heads]`, for a kernel with `native_sinks`; None without sinks.
        shifts: for each sequence, position of the first query minus position of the first key; None for bottom-right
            alignment. Ring attention uses it for parts of sequences.
        query_ids: for each sequence, the index of its first query token in dropout's hash; None for its row in q.
        key_ids: the same for keys.
        save: whether the backward pass will get exactly this output and logsumexp, so that the forward pass may save
            attention weights for it.
        logsumexp: whether the caller needs the logsumexp although the backward pass may not.
    """

    spec: AttentionSpec
    queries: PackedSequences
    keys: PackedSequences
    alibi_slopes: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    shifts: tuple[int, ...] | None = None
    query_ids: tuple[int, ...] | None = None
    key_ids: tuple[int, ...] | None = None
    save: bool = False
    logsumexp: bool = True


class AttentionKernel(Protocol):
    """A kernel for attention of packed sequences."""

    name: str

    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        """Return why this kernel does not support the request, or None if it does."""
        ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute attention. Differentiable in `q`, `k`, `v` and `sinks`.

        Args:
            q: `[query tokens, heads, head_dim]`.
            k: `[key tokens, kv_heads, head_dim]`.
            v: `[key tokens, kv_heads, value_dim]`.
            call: the other arguments.
            sinks: `[heads]`; None without sinks.

        Returns:
            `[query tokens, heads, value_dim]`.
        """
        ...


@runtime_checkable
class BlockKernel(Protocol):
    """A kernel with separate forward and backward passes that exposes the logsumexp, for sinks and ring attention.

    The backward pass takes the output and the logsumexp of the softmax over *all* keys, of which the given keys may be
    a part.
    """

    name: str
    native_sinks: bool  # whether the forward pass applies `call.sinks`

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output `[tokens, heads, value_dim]`, the logsumexp `[tokens, heads]`, and a saved tensor.

        The logsumexp uses the natural logarithm and is float32 (float64 for float64 input). For a query that sees no
        key the output is 0 and the logsumexp is -inf. The backward pass gets the saved tensor back.
        """
        ...

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        logsumexp: torch.Tensor,
        saved: torch.Tensor,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of q, k and v."""
        ...
