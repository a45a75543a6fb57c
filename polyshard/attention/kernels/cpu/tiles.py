"""Partition of packed sequences for the CPU kernels: runs of equal sequences, groups of them, and tiles of queries."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive sequences with equal lengths and alignment.

    Attributes:
        query: row of the first query token in q.
        key: row of the first key token in k.
        count: number of sequences.
        rows: number of queries of each sequence.
        keys: number of keys of each sequence.
        shift: position of a sequence's first query minus position of its first key.
        query_id: index of the first query token in dropout's hash.
        key_id: index of the first key token in dropout's hash.
    """

    query: int
    key: int
    count: int
    rows: int
    keys: int
    shift: int
    query_id: int
    key_id: int

    @property
    def query_rows(self) -> slice:
        """The rows of the run's queries in q."""
        return slice(self.query, self.query + self.count * self.rows)

    @property
    def key_rows(self) -> slice:
        """The rows of the run's keys in k and v."""
        return slice(self.key, self.key + self.count * self.keys)

    def part(self, first: int, count: int) -> Run:
        """Return the run of `count` of the sequences, beginning with sequence `first`."""
        return Run(
            self.query + first * self.rows,
            self.key + first * self.keys,
            count,
            self.rows,
            self.keys,
            self.shift,
            self.query_id + first * self.rows,
            self.key_id + first * self.keys,
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `[first, last)` of each sequence of a run, and the range of keys `[low, high)` that they can see."""

    first: int
    last: int
    low: int
    high: int


def runs(call: AttentionCall) -> tuple[Run, ...]:
    """Return the runs of a call's sequences, in order, without sequences that have no queries."""
    rows = call.queries.lengths
    keys = rows if call.keys is call.queries else call.keys.lengths
    return _runs(rows, keys, call.shifts, call.query_ids, call.key_ids)


@functools.lru_cache(maxsize=64)  # all layers of a step have the same arguments
def _runs(
    rows: tuple[int, ...],
    keys: tuple[int, ...],
    shifts: tuple[int, ...] | None,
    query_ids: tuple[int, ...] | None,
    key_ids: tuple[int, ...] | None,
) -> tuple[Run, ...]:
    query_starts, key_starts = tuple(accumulate(rows, initial=0)), tuple(accumulate(keys, initial=0))
    shifts = shifts or tuple(n - m for m, n in zip(rows, keys))
    query_ids, key_ids = query_ids or query_starts, key_ids or key_starts
    found: list[Run] = []
    for i, (m, n) in enumerate(zip(rows, keys)):
        if m == 0:
            continue
        this = Run(query_starts[i], key_starts[i], 1, m, n, shifts[i], query_ids[i], key_ids[i])
        if found and found[-1].part(found[-1].count, 1) == this:
            found[-1] = replace(found[-1], count=found[-1].count + 1)
        else:
            found.append(this)
    return tuple(found)


def groups(run: Run, elements_of_one: int, budget: int) -> Iterator[Run]:
    """Split a run so that the scores of one tile have at most `budget` elements and fit into the processor's cache."""
    limit = max(1, budget // max(1, elements_of_one))
    for first in range(0, run.count, limit):
        yield run.part(first, min(limit, run.count - first))


def tiles(run: Run, spec: AttentionSpec, rows: int) -> Iterator[Tile]:
    """Yield the tiles of one sequence of `run`. A tile that sees no key has `low == high`."""
    window = spec.sliding_window
    for first in range(0, run.rows, rows):
        last = min(first + rows, run.rows)
        low, high = 0, run.keys
        if spec.causal:
            high = min(high, last + run.shift)
        elif window is not None:
            high = min(high, last - 1 + run.shift + window)
        if window is not None:
            low = max(low, first + run.shift - window + 1)
        yield Tile(first, last, low, high) if low < high else Tile(first, last, 0, 0)


def every_row_sees(run: Run, tile: Tile, spec: AttentionSpec) -> bool:
    """Return whether every query of a tile sees a key."""
    ends = run.keys if spec.sliding_window is None else run.keys + spec.sliding_window - 1
    return run.shift >= 0 and tile.last - 1 + run.shift < ends


def tile_mask(run: Run, tile: Tile, spec: AttentionSpec, like: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """Return the additive mask of a tile's keys and the column at which it begins; None if nothing is masked.

    The mask contains 0 and -inf, in the dtype of `like`, and is `[rows, 1, columns]`.
    """
    first, last = tile.first + run.shift, tile.last + run.shift
    window = spec.sliding_window
    past = window is not None and last - 1 - tile.low >= window
    future = not spec.causal and window is not None and tile.high - 1 - first >= window
    if past or future:
        column = 0
    elif spec.causal and tile.high - 1 > first:
        column = max(0, first + 1 - tile.low)
    else:
        return None, 0
    distance = first - (tile.low + column)
    size = (last - first, tile.high - tile.low - column)
    return _mask(*size, distance, spec.causal, window, like.dtype, like.device), column


@functools.lru_cache(maxsize=256)
def _mask(
    rows: int,
    columns: int,
    distance: int,
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Build a mask; `distance` is the position of the first row minus the position of the first column."""
    apart = torch.arange(rows, device=device)[:, None] + distance - torch.arange(columns, device=device)[None]
    mask = apart < 0 if causal else torch.zeros_like(apart, dtype=torch.bool)
    if window is not None:
        mask |= apart.abs() >= window
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(mask, -math.inf).unsqueeze(1)
