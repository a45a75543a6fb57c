"""Text that every machine has: the Python language reference in the standard library."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch

VALIDATION_SHARE = 10  # every tenth topic is held out


def documents(validation: bool) -> list[str]:
    """Return the topics of the reference, keyed by name: the held-out topics or all others."""
    return [topics[name] for i, name in enumerate(sorted(topics)) if (i % VALIDATION_SHARE == 0) == validation]


def token_rows(tokenizer: Any, length: int, validation: bool) -> torch.Tensor:
    """Return the text as rows of `length + 1` tokens, for inputs and for labels shifted by one.

    Args:
        tokenizer: a tokenizer of transformers.
        length: number of input tokens in each row.
        validation: return the held-out topics.

    Returns:
        int64 `[rows, length + 1]`.
    """
    end = tokenizer.eos_token_id
    stream = [token for text in documents(validation) for token in [*tokenizer(text)["input_ids"], end]]
    rows = len(stream) // (length + 1)
    return torch.tensor(stream[: rows * (length + 1)]).view(rows, length + 1)
