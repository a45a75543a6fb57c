"""Tensors that are read from a file on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is read on demand.

    Attributes:
        load: reads the full tensor.
        read_region: reads a rectangle by offsets and sizes, if that is cheaper than `load`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    read_region: Callable[[Sequence[int], Sequence[int]], torch.Tensor] | None = None

    def part(self, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Read a rectangle.

        Examples:
            >>> values = torch.arange(6).view(2, 3)
            >>> LazyTensor((2, 3), torch.int64, lambda: values).part((0, 1), (2, 1))
            tensor([[1],
                    [4]])
        """
        if self.read_region is not None:
            return self.read_region(offsets, sizes)
        return self.load()[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))]
