"""A 64-bit fingerprint of a tensor's bits that is additive over its parts.

A tensor is read as rows of 64-bit words. Each word is multiplied by odd weights derived from its position in the
logical tensor, and the products are summed modulo 2**64. Every rank can therefore fingerprint its own part, however
the tensor is cut, and the sum over ranks is the fingerprint of the full tensor: two layouts are compared by one number
per tensor without moving data. Changing a single word always changes the sum; swapped rows, columns, halves or heads
and stale or missing parts change it except with a probability of about 2**-64. It is not a cryptographic hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

MASK = (1 << 64) - 1
_WORD = 8  # bytes
_CHUNK_BYTES = 4 << 20  # limit of temporary copies


def fingerprint(part: torch.Tensor, offsets: Sequence[int] = ()) -> int:
    """Return the fingerprint of a part of a tensor, as an integer below 2**64.

    Args:
        part: a rectangular part of any dtype and any strides.
        offsets: its position in the full tensor, one number for each dimension; the origin by default.

    Examples:
        >>> full = torch.arange(12.0).view(3, 4)
        >>> halves = fingerprint(full[:, :2]), fingerprint(full[:, 2:], (0, 2))
        >>> total(halves) == fingerprint(full)
        True
    """
    if part.numel() == 0:
        return 0
    start = tuple(offsets) or (0,) * part.dim()
    assert len(start) == part.dim(), f"{len(start)} offsets for {part.dim()} dimensions"
    part = part.detach()
    if part.dim() < 2:
        part, start = part.reshape(1, -1), (0, *start) if start else (0, 0)
    per_word = _WORD // part.element_size()
    lead = start[-1] % per_word
    aligned = lead == 0 and part.shape[-1] % per_word == 0 and part.data_ptr() % _WORD == 0
    if aligned and part.stride(-1) == 1 and all(s % per_word == 0 for s in part.stride()[:-1]):
        return _fold(part.view(torch.int64), (*start[:-1], start[-1] // per_word))
    # Copy chunk by chunk and pad with zeros to whole words, which add nothing to the sum.
    width = -(-(lead + part.shape[-1]) // per_word) * per_word
    rows = max(1, _CHUNK_BYTES // (width * part.element_size() * max(1, math.prod(part.shape[1:-1]))))
    result = 0
    for first in range(0, len(part), rows):
        chunk = part[first : first + rows]
        words = chunk.new_zeros((*chunk.shape[:-1], width))
        words[..., lead : lead + part.shape[-1]] = chunk
        result += _fold(words.view(torch.int64), (start[0] + first, *start[1:-1], start[-1] // per_word))
    return result & MASK


def total(parts: Iterable[int]) -> int:
    """Return the fingerprint of a full tensor from those of its disjoint parts."""
    return sum(parts) & MASK


def text(value: int) -> str:
    """Format a fingerprint as sixteen hexadecimal digits.

    Examples:
        >>> text(255)
        '00000000000000ff'
    """
    return f"{value & MASK:016x}"


def _fold(words: torch.Tensor, start: tuple[int, ...]) -> int:
    """Return the sum of words `[..., rows, columns]` times the weights of their positions."""
    dims = words.dim()
    weights = _weights(dims - 1, start[-1], words.shape[-1], words.device)
    if words.device.type == "cpu" and dims == 2:
        sums = torch.mv(words, weights)  # one pass over memory, without a temporary
    else:
        rows = max(1, _CHUNK_BYTES // (_WORD * math.prod(words.shape[1:])))
        sums = torch.cat([(chunk * weights).sum(-1) for chunk in words.split(rows)])
    for dim in range(dims - 2, -1, -1):
        sums = (sums * _weights(dim, start[dim], sums.shape[dim], sums.device)).sum(-1)
    return int(sums) & MASK


def _weights(dim: int, start: int, length: int, device: torch.device) -> torch.Tensor:
    size = 1 << max(10, (start + length - 1).bit_length())
    return _table(dim, size, str(device))[start : start + length]


@lru_cache(maxsize=32)
def _table(dim: int, size: int, device: str) -> torch.Tensor:
    """Return odd pseudo-random numbers by position: splitmix64 (Steele, Lea and Flood 2014)."""
    x = torch.arange(size, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(0xD1342543DE82EF95 * (dim + 1))
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return ((x ^ _shift(x, 31)) | 1).to(device)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift; torch's shift is arithmetic


def _signed(value: int) -> int:
    value &= MASK
    return value - (1 << 64) if value >> 63 else value
