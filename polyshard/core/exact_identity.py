"""Whether a trainer and a server compute the same bits: what exact mode compares before they meet."""

from __future__ import annotations

from typing import NamedTuple

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError


class ExactIdentity(NamedTuple):
    """What trainer and server have in common where both compute the same bits."""

    shards: int
    products: str
    attention: str


def identity_of(context: ParallelContext | None) -> ExactIdentity | None:
    """Return the identity of a context's exact mode; None without one."""
    if context is None or context.exact is None:
        return None
    operators = context.exact.operators
    return ExactIdentity(context.exact.shards, operators.products, operators.attention)


def exact_kernel(context: ParallelContext, asked: str | None) -> str | None:
    """The attention kernel of a context's exact mode; without it the one that was asked for.

    Raises:
        ConfigurationError: another one was asked for.
    """
    exact = context.exact
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
            "processors, C++ compiler and POLYSHARD_MATMUL (polyshard doctor says which product a machine has)"
        )
    raise ConfigurationError(
        f"the trainer attends by {trainer.attention}, {name} by {server.attention}: give both the same processors, C++ "
        "compiler and POLYSHARD_ATTENTION"
    )
