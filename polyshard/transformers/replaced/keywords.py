"""Keywords that transformers' models pass to attention: which are ignored, and an error for all others.

A keyword that is swallowed changes the result in silence: transformers 5.24 passes the cache under another name than
5.23. Source: transformers 5, `TransformersKwargs` and `FlashAttentionKwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.core.errors import ConfigurationError

# They say nothing about what attention computes, or say it again.
IGNORED = frozenset(
    {
        "cache_position",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",  # where it is False
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",  # for layers with a state
        "use_cache",
    }
)


def refuse_unknown(keywords: Mapping[str, Any], name: str) -> None:
    """Raise for keywords that polyshard's attention neither knows nor may ignore.

    Args:
        keywords: what is left of a call's keyword arguments; those that are None or False ask for nothing.
        name: of the module called, for the message.

    Raises:
        ConfigurationError: one of them is unknown, or attention weights are asked for.
    """
    asked = sorted(key for key, value in keywords.items() if value is not None and value is not False)
    if "output_attentions" in asked:
        raise ConfigurationError(
            f"{name} cannot return attention weights: got output_attentions=True, and no flash kernel has them. "
            "Leave it out, or use the model with attn_implementation='eager'"
        )
    unknown = [key for key in asked if key not in IGNORED]
    if unknown:
        raise ConfigurationError(
            f"{name} was given unsupported arguments: got {', '.join(unknown)}, expected only those that polyshard's "
            "attention knows. Leave them out, or use a version of transformers that polyshard is tested with"
        )
