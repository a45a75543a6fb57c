"""Keyword arguments that transformers' models pass to attention: some are ignored, all others are errors.

Silently dropping a keyword would change the result: transformers 5.24 passes the cache under another name than 5.23.
Source: transformers 5, `TransformersKwargs` and `FlashAttentionKwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.core.errors import ConfigurationError

# These do not affect the result of attention, or are redundant.
IGNORED = frozenset(
    {
        "cache_position",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",  # if it is False
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",  # for layers with a state
        "use_cache",
    }
)


def refuse_unknown(keywords: Mapping[str, Any], name: str) -> None:
    """Raise an error for keywords that polyshard's attention neither supports nor may ignore.

    Args:
        keywords: the remaining keyword arguments of a call; None and False are ignored.
        name: name of the called module, for the message.

    Raises:
        ConfigurationError: a keyword is unknown, or attention weights are requested.
    """
    asked = sorted(key for key, value in keywords.items() if value is not None and value is not False)
    if "output_attentions" in asked:
        raise ConfigurationError(
            f"{name} cannot return attention weights: got output_attentions=True, but no flash kernel computes them. "
            "Omit it, or use the model with attn_implementation='eager'."
        )
    unknown = [key for key in asked if key not in IGNORED]
    if unknown:
        raise ConfigurationError(
            f"{name} was called with unsupported arguments: got {', '.join(unknown)}. Omit them, or use a version of "
            "transformers that polyshard is tested with."
        )
