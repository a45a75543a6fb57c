"""Reduced configurations: of the same family and layer pattern, but small enough to run on random tokens."""

from __future__ import annotations

import copy
import re
from typing import Any

WINDOW = 8  # the longest window, in tokens, of a reduced configuration
ORIGINAL = 16  # tokens that a longrope scaling was trained with
VOCABULARY = 128
_INTERMEDIATE = 80
_HIDDEN = 96  # hidden size, if it is not heads * head_dim
_POSITIONS = 256  # minimum
_EXPERTS, _PER_TOKEN = 8, 4  # at most, unless there are more groups of experts
_ALL_EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$")
_CHOSEN = re.compile(r"^num_experts_per_tok(en)?$|^moe_top_?k$")
_WINDOWS = re.compile(r"window(_size)?$|^attention_chunk_size$|^local_attention$")
_INNER = re.compile(r"intermediate|ffn|^n_inner$|^d_inner$")


def reduced_config(config: Any, heads_divide_by: int = 2) -> Any:
    """Return a copy with fewer heads and experts, smaller layers, shorter windows and a smaller vocabulary.

    The number of layers, their pattern, the head size (on which rotary factors depend), biases, norms and scalings are
    kept, and so is whether one, some or all query heads share a key head.

    Args:
        config: a transformers config of a text model.
        heads_divide_by: the number of query heads is a multiple of it.

    Raises:
        Exception: of any kind, if the config has unknown names for its sizes.
    """
    small = with_fewer_tokens(config)
    hidden, heads = small.hidden_size, small.num_attention_heads
    kv_heads = getattr(small, "num_key_value_heads", None) or heads
    head_dim = getattr(small, "head_dim", None) or hidden // heads
    new_heads = heads_divide_by * (2 if 1 < kv_heads < heads else 1)
    new_hidden = new_heads * head_dim if hidden == heads * head_dim else _HIDDEN
    for name, value in _integers(small).items():
        if name.endswith("token_id") or "vocab_size" in name or "position" in name:
            continue
        if _ALL_EXPERTS.search(name):
            setattr(small, name, min(value, max(_EXPERTS, 2 * (getattr(small, "n_group", None) or 1))))
        elif _CHOSEN.search(name):
            setattr(small, name, min(value, _PER_TOKEN))
        elif _INNER.search(name):
            setattr(small, name, min(value, _INTERMEDIATE))
        elif value == hidden:
            setattr(small, name, new_hidden)
    small.hidden_size, small.num_attention_heads = new_hidden, new_heads
    if getattr(small, "num_key_value_heads", None) is not None:
        small.num_key_value_heads = 1 if kv_heads == 1 else new_heads if kv_heads == heads else heads_divide_by
    return small


def with_fewer_tokens(config: Any) -> Any:
    """Return a copy with short windows and a small vocabulary, at the full width."""
    small = with_short_windows(config)
    for name, value in _integers(small).items():
        if name.endswith("token_id"):
            setattr(small, name, min(value, VOCABULARY - 1))
        elif "vocab_size" in name:
            setattr(small, name, min(value, VOCABULARY))
    return small


def with_layers(config: Any, count: int) -> Any:
    """Return a copy with the first `count` layers; lists with an entry for each layer are truncated as well."""
    small = copy.deepcopy(config)
    before = small.num_hidden_layers
    for name, value in small.to_dict().items():
        if isinstance(value, list) and len(value) == before and hasattr(small, name):
            setattr(small, name, value[:count])
    small.num_hidden_layers = count
    return small


def with_short_windows(config: Any) -> Any:
    """Return a copy with windows of at most `WINDOW` tokens, so that sequences exceed them; other sizes are kept."""
    small = copy.deepcopy(config)
    for name, value in _integers(small).items():
        if _WINDOWS.search(name):
            setattr(small, name, min(value, WINDOW))
    positions = getattr(small, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return small
    _shorten_rotary(getattr(small, "rope_parameters", None), positions)
    if isinstance(getattr(small, "original_max_position_embeddings", None), int):
        small.original_max_position_embeddings = min(small.original_max_position_embeddings, ORIGINAL)
    if positions < _POSITIONS:
        small.max_position_embeddings = _POSITIONS
    return small


def _shorten_rotary(parameters: Any, positions: int) -> None:
    """Let the trial's sequence reach the long factors of a longrope scaling if the model's sequences can."""
    if not isinstance(parameters, dict):
        return
    for inner in parameters.values():
        _shorten_rotary(inner, positions)
    original = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "longrope" and isinstance(original, int) and positions > original:
        parameters["original_max_position_embeddings"] = min(original, ORIGINAL)


def _integers(config: Any) -> dict[str, int]:
    fields = config.to_dict()
    return {name: value for name, value in fields.items() if isinstance(value, int) and not isinstance(value, bool)}
