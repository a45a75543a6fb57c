"""Slopes of attention with linear biases. Source: Press et al. 2021, "Train Short, Test Long"."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyshard.core.errors import ConfigurationError


def slopes_of_heads(num_heads: int, alibi: bool | Sequence[float]) -> tuple[float, ...] | None:
    """One slope for each of all query heads: the given ones, the usual ones for True, None for False."""
    if isinstance(alibi, bool):
        return usual_slopes(num_heads) if alibi else None
    slopes = tuple(float(slope) for slope in alibi)
    if len(slopes) != num_heads:
        raise ConfigurationError(f"{num_heads} heads need as many ALiBi slopes, got {len(slopes)}")
    return slopes


def usual_slopes(num_heads: int) -> tuple[float, ...]:
    """Powers of `2^(-8 / n)`; for `n` that is no power of two, every second one of `2n` fills up, as the authors do."""
    whole = 2 ** math.floor(math.log2(num_heads))
    base = 2.0 ** (-8.0 / whole)
    slopes = [base ** (i + 1) for i in range(whole)]
    extra = 2.0 ** (-4.0 / whole)
    slopes += [extra ** (2 * i + 1) for i in range(num_heads - whole)]
    return tuple(slopes)
