"""The data of one training step: micro-batches, functions for their losses and token counts, and the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

MicroBatch = Mapping[str, Any]
SumLoss = Callable[[Any, MicroBatch], torch.Tensor]
CountTokens = Callable[[MicroBatch], torch.Tensor]

IGNORED = -100  # label of a token without a target, as in torch and transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """The loss of one step's micro-batches.

    Attributes:
        loss: float64 scalar: the mean over all tokens with a label, equal on every rank; 0 if there are none.
        tokens: float64 scalar: the number of tokens with a label, over all micro-batches and ranks.

    Examples:
        >>> result = BatchResult(loss=torch.tensor(2.5), tokens=torch.tensor(96.0))
        >>> f"loss {result.loss:.2f} over {result.tokens:.0f} tokens"
        'loss 2.50 over 96 tokens'
    """

    loss: torch.Tensor
    tokens: torch.Tensor
