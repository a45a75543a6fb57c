"""Dropout masks as a pure function of seed, head, query token and key token.

Runs are thereby reproducible, the backward pass recomputes the mask of the forward pass, and with equal seeds the mask
depends neither on a kernel's tiles nor on the ranks over which heads and tokens are sharded.

Source of the mixing function: Wellons 2018, "Prospecting for Hash Functions" (lowbias32).
"""

from __future__ import annotations

import torch

_SIGNED = 1 << 31


def kept(
    seed: torch.Tensor, dropout: float, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Return which attention weights are kept.

    Args:
        seed: int64 scalar.
        dropout: probability of dropping a weight.
        heads: int64 global indices of heads.
        queries: int64 indices of query tokens.
        keys: int64 indices of key tokens. The three tensors are broadcast with each other.

    Returns:
        bool in the broadcast shape.
    """
    # Without .item(), so that torch.compile can trace it. The casts keep the low 32 bits.
    low, high = (part.to(torch.int32) for part in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    rows = _mixed(_mixed(heads.to(torch.int32) ^ low) ^ queries.to(torch.int32))
    columns = _mixed(_mixed(keys.to(torch.int32) ^ high) ^ 0x5BD1E995)
    bits = _mix_(rows ^ columns).bitwise_and_(_SIGNED - 1)
    return bits >= int(dropout * _SIGNED)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    return _mix_(x.clone())


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """Mix bits in place. The masks turn arithmetic shifts into logical ones."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _int32(number: int) -> int:
    """Return the low 32 bits as a signed number."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >= _SIGNED else number
