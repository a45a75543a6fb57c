"""Text that every machine has: the Python language reference in the standard library."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

VALIDATION_SHARE = 10  # every tenth topic is held out


def documents(validation: bool) -> list[str]:
    """Return the topics of the reference, keyed by name: the held-out topics or all others."""
    return [topics[name] for i, name in enumerate(sorted(topics)) if (i % VALIDATION_SHARE == 0) == validation]


def token_documents(tokenizer: Any, validation: bool) -> list[list[int]]:
    """Return the token IDs of each topic, with the end-of-text token at its end.

    Args:
        tokenizer: a tokenizer of transformers.
        validation: return the held-out topics.
    """
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents(validation)]
