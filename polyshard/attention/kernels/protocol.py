"""What a kernel offers."""

from __future__ import annotations

from typing import Protocol

import torch

from polyshard.core.attention import AttentionSpec, PackedSequences


class AttentionKernel(Protocol):
    """Attention of packed sequences with a right backward."""

    name: str

    def rejects(self, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
        """Why this kernel cannot serve the request; None where it can."""
        ...

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sequences: PackedSequences,
        spec: AttentionSpec,
        training: bool,
    ) -> torch.Tensor:
        """`q [tokens, heads, dim]`, `k` and `v [tokens, kv_heads, dim]` to `[tokens, heads, dim]`."""
        ...
