"""What a kernel offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from polyshard.core.attention import AttentionSpec, PackedSequences


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call's task beside its tensors.

    Attributes:
        spec: the request; its dropout is 0 outside training.
        queries: boundaries of the packed queries.
        keys: boundaries of the packed keys, of as many sequences. Where a sequence has more keys than queries, its
            queries are the last ones (bottom-right alignment, as in flash-attention).
        alibi_slopes: float32 `[heads]` on the device; None without.
        seed: int64 scalar on the CPU; None without dropout.
        sinks: `[heads]`, for a kernel with `native_sinks`.
        shifts: per sequence, position of the first query less position of the first key; None for the alignment
            above. Ring attention hands out parts of sequences by it.
        query_ids: per sequence, the number by which dropout knows its first query token; None for its place here.
        key_ids: the same of keys.
        save: whether the backward will be given this very output and logsumexp: weights may be kept for it.
        logsumexp: whether it is wanted, where the backward could do without.
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
    """Attention of packed sequences with a right backward."""

    name: str

    def unsupported_reason(
        self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
    ) -> str | None:
        """Why this kernel cannot serve the request; None where it can."""
        ...

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Differentiable in the tensors.

        Args:
            q: `[query tokens, heads, head_dim]`.
            k: `[key tokens, kv_heads, head_dim]`.
            v: `[key tokens, kv_heads, value_dim]`.
            call: the rest.
            sinks: `[heads]`; None without.

        Returns:
            `[query tokens, heads, value_dim]`.
        """
        ...


@runtime_checkable
class BlockKernel(Protocol):
    """A kernel in two halves, with the logsumexp between them: sinks and ring attention are built on these.

    The backward takes the output and logsumexp of the *whole* softmax, of which these keys may be a part.
    """

    name: str
    native_sinks: bool  # whether the forward applies `call.sinks` itself

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Out `[tokens, heads, value_dim]`, logsumexp `[tokens, heads]`, and what the backward needs beside.

        The logsumexp is natural, in float32 (float64 for float64); where a query sees no key the output is 0 and the
        logsumexp is -inf.
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
        """Gradients of q, k and v."""
        ...
