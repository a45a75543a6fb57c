"""Slopes of attention with linear biases (ALiBi). Source: Press et al. 2021, "Train Short, Test Long"."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyshard.core.errors import ConfigurationError


def slopes_of_heads(num_heads: int, alibi: bool | Sequence[float]) -> tuple[float, ...] | None:
    """Return one slope for each query head: the given slopes, the standard ones for True, or None for False.

    Raises:
        ConfigurationError: the number of slopes is not `num_heads`.
    """
    if isinstance(alibi, bool):
        return standard_slopes(num_heads) if alibi else None
    slopes = tuple(float(slope) for slope in alibi)
    if len(slopes) != num_heads:
        raise ConfigurationError(
            f"The number of ALiBi slopes is wrong: got {len(slopes)}, expected one for each of {num_heads} query heads."
        )
    return slopes


def standard_slopes(num_heads: int) -> tuple[float, ...]:
    """Return the slopes of the ALiBi authors: powers of `2^(-8 / num_heads)`.

    If `num_heads` is not a power of two, they are the slopes for the next lower power `p`, and then every second of
    the slopes for `2 p`.

    Examples:
        >>> standard_slopes(4)
        (0.25, 0.0625, 0.015625, 0.00390625)
    """
    power = 2 ** math.floor(math.log2(num_heads))
    base = 2.0 ** (-8.0 / power)
    slopes = [base ** (i + 1) for i in range(power)]
    extra = 2.0 ** (-4.0 / power)
    slopes += [extra ** (2 * i + 1) for i in range(num_heads - power)]
    return tuple(slopes)
