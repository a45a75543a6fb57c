"""The data of one training step: micro-batches, their losses and token counts, and the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MicroBatch = Mapping[str, Any]
SumLoss = Callable[[Any, MicroBatch], torch.Tensor]
CountTokens = Callable[[MicroBatch], torch.Tensor]

IGNORED = -100  # label of a token that has none, as in torch and transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What the micro-batches of one step gave.

    Attributes:
        loss: scalar, float64, the mean over all tokens that count, the same on every rank; 0 if no token counts.
        tokens: scalar, float64, how many tokens count, over all micro-batches and ranks.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
