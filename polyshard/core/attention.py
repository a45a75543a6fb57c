"""The one place where training and serving differ in a decoder: how attention reads keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one attention layer asks of its kernel; head counts are this rank's.

    Attributes:
        num_heads: query heads on this rank.
        num_kv_heads: key and value heads on this rank; divides `num_heads`.
        head_dim: size of one head.
        scale: factor on q·k before the softmax.
        causal: keys after the query's position are masked.
        sliding_window: keys `j` with `0 <= i - j < sliding_window` are seen; None for all.
        dropout: probability of dropping an attention weight in training.
        layer_index: global index of the layer, where the user gave one.
        head_offset: global index of this rank's first query head (dropout is a function of the global head).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    sliding_window: int | None = None
    dropout: float = 0.0
    layer_index: int | None = None
    head_offset: int = 0


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Sequences laid end to end.

    Attributes:
        cu_seqlens: int32 `[sequences + 1]`, cumulative lengths from 0 to the number of tokens, on the device.
        lengths: the same lengths as Python integers; kernels on CPU loop over them.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths, default=0)


class AttentionCore(Protocol):
    """Attention proper: a flash kernel in training, a paged KV cache in a server."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: `[tokens, heads, head_dim]`, rotary embedding applied.
            k: `[tokens, kv_heads, head_dim]`, rotary embedding applied.
            v: `[tokens, kv_heads, head_dim]`.
            sequences: where each sequence begins; None in a server, which knows it from its own metadata.

        Returns:
            `[tokens, heads, head_dim]`.
        """
        ...


AttentionFactory = Callable[[AttentionSpec], AttentionCore]
