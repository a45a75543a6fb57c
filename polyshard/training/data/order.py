"""The order in which a run reads its rows: a function of the seed, equal at every data-parallel size."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from polyshard.core.errors import ConfigurationError

Last = Literal["carry", "drop", "error"]


def is_count(value: object, least: int) -> bool:
    """Whether a value is an integer that is not below `least`.

    Examples:
        >>> is_count(4, 1), is_count(4.0, 1), is_count(True, 1)
        (True, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


class Position(NamedTuple):
    """A place in the order: the epoch, and the number of its rows that are consumed."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOrder:
    """The rows of every step of a run, over all ranks.

    Attributes:
        rows: number of rows of the dataset.
        batch: rows of a step.
        seed: seed of the order; each epoch has its own order.
        shuffle: False reads the rows in order.
        last: what becomes of rows at the end of an epoch that do not fill a step: `"carry"` begins the next epoch in
            the same step, `"drop"` leaves them out, and `"error"` refuses a dataset that has any.

    Raises:
        ConfigurationError: a field is out of range, or the dataset cannot be divided and `last` is `"error"`.
    """

    rows: int
    batch: int
    seed: int = 0
    shuffle: bool = True
    last: Last = "carry"

    def __post_init__(self) -> None:
        if self.last not in get_args(Last):
            raise ConfigurationError(f"last is invalid: got {self.last!r}, expected one of {', '.join(get_args(Last))}")
        if not is_count(self.batch, 1):
            raise ConfigurationError(f"batch is invalid: got {self.batch!r}, expected at least 1 row.")
        if not isinstance(self.shuffle, bool):
            raise ConfigurationError(f"shuffle is invalid: got {self.shuffle!r}, expected True or False.")
        if not isinstance(self.seed, numbers.Integral) or not -(2**63) <= self.seed < 2**63:
            raise ConfigurationError(f"seed is invalid: got {self.seed!r}, expected an integer of 64 bits.")
        if self.rows < 1 or (self.last != "carry" and self.rows < self.batch):
            raise ConfigurationError(f"the dataset is too small: got {self.rows} rows for steps of {self.batch}.")
        if self.last == "error" and self.rows % self.batch:
            raise ConfigurationError(
                f"the dataset cannot be divided into steps of {self.batch} rows: got {self.rows} rows, "
                f"{self.rows % self.batch} too many. Pass last='carry' or last='drop'."
            )

    def epoch(self, number: int) -> torch.Tensor:
        """Return the rows of an epoch, in the order in which they are read."""
        if not self.shuffle:
            return torch.arange(self.rows)
        # Hashed, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        seed = int.from_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest()[:8], "little", signed=True)
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))

    def steps(self, start: Position, epochs: int | None = None) -> Iterator[tuple[list[int], Position]]:
        """Yield the rows of each step from `start` on, with the position after it; forever without `epochs`."""
        number, at = start
        chosen: list[int] = []
        while epochs is None or number < epochs:
            order = self.epoch(number)
            # A position of another batch size may leave a different number of rows.
            end = self.rows if self.last == "carry" else self.rows - (self.rows - at) % self.batch
            while at < end:
                taken = order[at : min(end, at + self.batch - len(chosen))].tolist()
                chosen += taken
                at += len(taken)
                if len(chosen) == self.batch:
                    yield chosen, Position(number, at)
                    chosen = []
            number, at = number + 1, 0
