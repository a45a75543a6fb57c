"""Exact mode as data: a trainer and a server that compute by the same operators, whose bits no batch changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

Product = Callable[[torch.Tensor], torch.Tensor]


class ExactOperators(Protocol):
    """Forward-only operators. A row of their output depends only on that row of the input, bit for bit.

    Attributes:
        attention_kernel: name of the attention kernel that gives the server's bits.
    """

    attention_kernel: str

    @property
    def products(self) -> str:
        """Matrix product of each dtype in this process, as text. It must be the same on both sides."""
        ...

    @property
    def attention(self) -> str:
        """Attention kernel of each dtype in this process, as text. It must be the same on both sides."""
        ...

    def pack(self, weight: torch.Tensor) -> Product:
        """The product `x -> x Wᵀ` for x `[rows, in]` and W `[out, in]`, whose values it may copy."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`[..., hidden]` to the same shape; `weight` is `[hidden]` of the dtype of `x`."""
        ...

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both rotated, as new tensors.

        Args:
            q: `[..., heads, head_dim]`.
            k: `[..., kv_heads, head_dim]`.
            cos: `[..., 1, rotary_dim / 2]`.
            sin: the same shape.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMode:
    """What a context in exact mode carries.

    Attributes:
        shards: how many partial products each row-parallel layer is summed from, in a fixed order, at every
            tensor-parallel size that divides it.
        operators: what the forward is made of.
        around: `(linear adapter) -> linear adapter` whose layers compute exactly.
        whole: `(nn.Linear, context) -> module` that multiplies by a whole linear layer's parameters exactly.
        rotate: the operators' rotary embedding, with a backward.
        compute_dtype: of activations and products where the parameters are wider (float32 masters of a bfloat16
            server); None for the parameters' own.
    """

    shards: int
    operators: ExactOperators
    around: Callable[[Any], Any]
    whole: Callable[[nn.Linear, Any], nn.Module]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    compute_dtype: torch.dtype | None = None
