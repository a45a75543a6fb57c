"""The comparison of a trainer's and a server's exact mode, before weights are exchanged."""

from __future__ import annotations

from typing import NamedTuple

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError


class ExactIdentity(NamedTuple):
    """The settings that must be equal on trainer and server for both to compute the same bits.

    Attributes:
        shards: number of partial products from which each row-parallel layer is summed.
        matmul: matmul kernel of each dtype.
        attention: attention kernel of each dtype.
    """

    shards: int
    matmul: str
    attention: str


def identity_of(context: ParallelContext | None) -> ExactIdentity | None:
    """Return the identity of a context's exact mode, or None in the ordinary mode."""
    if context is None or context.exact is None:
        return None
    operators = context.exact.operators
    return ExactIdentity(context.exact.shards, operators.matmul_by_dtype, operators.attention_by_dtype)


def exact_kernel(context: ParallelContext, requested: str | None) -> str | None:
    """Return the name of the attention kernel of exact mode, or the requested name in the ordinary mode.

    Raises:
        ConfigurationError: another kernel was requested in exact mode.
    """
    exact = context.exact
    if exact is None:
        return requested
    kernel: str = exact.operators.attention_kernel
    if requested not in (None, kernel):
        raise ConfigurationError(
            f"The attention kernel is unsupported in exact mode: got {requested!r}, expected {kernel!r}. Remove the "
            "argument kernel."
        )
    return kernel


def check_same_mode(trainer: ExactIdentity | None, server: ExactIdentity | None, name: str) -> None:
    """Raise `ConfigurationError` unless trainer and server compute the same bits, or neither is in exact mode.

    Args:
        trainer: the trainer's identity; None in the ordinary mode.
        server: the server's identity; None in the ordinary mode.
        name: a name for the server in the message, such as "engine 0".
    """
    if trainer == server:
        return
    if trainer is None:
        assert server is not None
        raise ConfigurationError(
            f"Trainer and server differ in exact mode: {name} serves in it, but the trainer's context is not exact, so "
            "that their log-probabilities would differ. Initialize the context with exact=True, "
            f"exact_shards={server.shards}, or register the model without exact=True."
        )
    if server is None:
        raise ConfigurationError(
            f"Trainer and server differ in exact mode: the trainer's context is exact, but {name} does not serve in "
            "exact mode, so that their log-probabilities would differ. Register the model with exact=True, "
            f"exact_shards={trainer.shards}, or initialize the context without exact=True."
        )
    if trainer.shards != server.shards:
        raise ConfigurationError(
            f"Trainer and server differ in the number of exact shards: got exact_shards={trainer.shards} for the "
            f"trainer and {server.shards} for {name}. Give both the same multiple of both tensor-parallel sizes."
        )
    if trainer.matmul != server.matmul:
        raise ConfigurationError(
            f"Trainer and server differ in the matmul kernel: got {trainer.matmul} for the trainer and {server.matmul} "
            f"for {name}. Give both the same processor type, C++ compiler and POLYSHARD_MATMUL; polyshard doctor shows "
            "a machine's kernel."
        )
    raise ConfigurationError(
        f"Trainer and server differ in the attention kernel: got {trainer.attention} for the trainer and "
        f"{server.attention} for {name}. Give both the same processor type, C++ compiler and POLYSHARD_ATTENTION."
    )
