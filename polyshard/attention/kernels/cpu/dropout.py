"""Dropout as a pure function of seed, head, query token and key token.

So a run is reproducible, the backward draws again what the forward drew, and nothing changes with the tiles of a kernel
or with the ranks over which heads and tokens are spread (where all were given the same seed).

Source of the mixing function: Wellons 2018, "Prospecting for Hash Functions" (lowbias32).
"""

from __future__ import annotations

import torch

_SIGNED = 1 << 31


def kept(
    seed: torch.Tensor, dropout: float, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Which weights stay.

    Args:
        seed: int64 scalar.
        dropout: probability of dropping.
        heads: int64 global heads.
        queries: int64 numbers of query tokens.
        keys: int64 numbers of key tokens. The three broadcast with each other.

    Returns:
        bool of the broadcast shape.
    """
    # No .item(): a compiled graph draws, too. The casts keep the low 32 bits.
    low, high = (part.to(torch.int32) for part in (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    rows = _mixed(_mixed(heads.to(torch.int32) ^ low) ^ queries.to(torch.int32))
    columns = _mixed(_mixed(keys.to(torch.int32) ^ high) ^ 0x5BD1E995)
    bits = _mix_(rows ^ columns).bitwise_and_(_SIGNED - 1)
    return bits >= int(dropout * _SIGNED)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    return _mix_(x.clone())


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """In place; the shifts are logical, hence the masks."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _int32(number: int) -> int:
    """The low 32 bits, as a signed number."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >= _SIGNED else number
