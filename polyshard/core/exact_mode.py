"""Exact mode as data: a trainer and a server that compute by the same operators, whose bits no batch changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError

Product = Callable[[torch.Tensor], torch.Tensor]


class ExactOperators(Protocol):
    """Forward-only operators. A row of their output depends on that row of the input alone, bit for bit.

    Attributes:
        attention_kernel: name of the attention kernel that gives the server's bits.
        products: whose matrix product multiplies which dtype in this process; has to be the same on both sides.
        attention: whose kernel attends in which dtype in this process; likewise.
    """

    attention_kernel: str

    @property
    def products(self) -> str:
        """See the class."""
        ...

    @property
    def attention(self) -> str:
        """See the class."""
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


class ExactIdentity(NamedTuple):
    """What trainer and server have in common where both compute the same bits."""

    shards: int
    products: str
    attention: str


def identity_of(context: Any) -> ExactIdentity | None:
    """Of a context's exact mode; None where it has none."""
    exact = getattr(context, "exact", None)
    if exact is None:
        return None
    operators: ExactOperators = exact.operators
    return ExactIdentity(exact.shards, operators.products, operators.attention)


def exact_kernel(context: Any, asked: str | None) -> str | None:
    """The attention kernel of a context's exact mode; without it the one that was asked for.

    Raises:
        ConfigurationError: another one was asked for.
    """
    exact = getattr(context, "exact", None)
    if exact is None:
        return asked
    kernel: str = exact.operators.attention_kernel
    if asked not in (None, kernel):
        raise ConfigurationError(f"exact mode attends by the kernel {kernel!r}: take away kernel={asked!r}")
    return kernel


def check_same_mode(trainer: ExactIdentity | None, server: ExactIdentity | None, name: str) -> None:
    """Raise `ConfigurationError` where one side alone is in exact mode, or they do not compute alike.

    Args:
        trainer: None for the ordinary mode.
        server: likewise.
        name: of the server, for the message.
    """
    if trainer == server:
        return
    if trainer is None:
        assert server is not None
        raise ConfigurationError(
            f"{name} serves in exact mode, the trainer's context is not exact: their log-probabilities would differ. "
            f"Initialize it with exact=True, exact_shards={server.shards}, or register the model without exact=True"
        )
    if server is None:
        raise ConfigurationError(
            f"the trainer's context is in exact mode, {name} does not serve in it: their log-probabilities would "
            f"differ. Register its model with exact=True, exact_shards={trainer.shards}, or initialize without "
            "exact=True"
        )
    if trainer.shards != server.shards:
        raise ConfigurationError(
            f"the trainer sums row-parallel layers from exact_shards={trainer.shards}, {name} from {server.shards}: "
            "give both the same, a multiple of both tensor-parallel sizes"
        )
    if trainer.products != server.products:
        raise ConfigurationError(
            f"the trainer multiplies by {trainer.products}, {name} by {server.products}: give both the same "
            "processors, C++ compiler and POLYSHARD_PRODUCT (polyshard doctor says which product a machine has)"
        )
    raise ConfigurationError(
        f"the trainer attends by {trainer.attention}, {name} by {server.attention}: give both the same processors, C++ "
        "compiler and POLYSHARD_ATTENTION"
    )
