"""Exact mode as data: operators that trainer and server share and whose results do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

Matmul = Callable[[torch.Tensor], torch.Tensor]


class ExactOperators(Protocol):
    """Operators without autograd. A row of their output depends only on the same row of the input, bit for bit.

    Attributes:
        attention_kernel: name of the attention kernel with the server's bits.
    """

    attention_kernel: str

    @property
    def matmul_by_dtype(self) -> str:
        """The matmul kernel of each dtype in this process, as text. Must be equal on trainer and server."""
        ...

    @property
    def attention_by_dtype(self) -> str:
        """The attention kernel of each dtype in this process, as text. Must be equal on trainer and server."""
        ...

    def pack(self, weight: torch.Tensor) -> Matmul:
        """Return the matmul `x -> x Wᵀ` for x `[rows, in]` and W `[out, in]`. It may hold a copy of the weight."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalize `x` `[..., hidden]`; `weight` is `[hidden]`, in the dtype of `x`."""
        ...

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the rotary embedding to queries and keys. Returns new tensors.

        Args:
            q: `[..., heads, head_dim]`.
            k: `[..., kv_heads, head_dim]`.
            cos: `[..., 1, rotary_dim / 2]`.
            sin: the shape of `cos`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactMode:
    """The settings and functions of exact mode that a context holds.

    Attributes:
        shards: number of partial products from which each row-parallel layer is summed, in a fixed order, at every
            tensor-parallel size that divides it.
        operators: the operators of the forward pass.
        wrap_adapter: returns an adapter that builds exact versions of the layers of the given `LinearAdapter`.
        replicated_linear: returns an exact module with the parameters of the given replicated `nn.Linear`; the second
            argument is the context, the third the dtype of the matmul if it is not that of the model.
        sigmoid: a differentiable sigmoid whose bits for an element do not depend on the rest of the tensor.
        rotate: the operators' rotary embedding, with a backward pass.
        compute_dtype: dtype of activations and matmuls if it is narrower than the parameters' (a trainer with float32
            parameters and a bfloat16 server); None for the parameters' dtype.
    """

    shards: int
    operators: ExactOperators
    wrap_adapter: Callable[[Any], Any]
    replicated_linear: Callable[..., nn.Module]
    sigmoid: Callable[[torch.Tensor], torch.Tensor]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    compute_dtype: torch.dtype | None = None
