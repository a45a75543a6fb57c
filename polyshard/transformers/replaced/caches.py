"""Keys and values of transformers' caches: which of their slots are filled."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.core.errors import ConfigurationError

_PACKED = "polyshard_packed"  # attribute set on a cache with several sequences in a row


def extend(
    cache: Any, k: torch.Tensor, v: torch.Tensor, layer_index: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Add keys and values to a cache.

    Args:
        cache: a transformers cache: dynamic, static, with sliding windows, or quantized.
        k: `[batch, seq, kv_heads, head_dim]`.
        v: same shape as `k`.
        layer_index: index of the layer in the cache.

    Returns:
        Keys and values of the filled slots, of which the last `seq` belong to the call; and the number of tokens that
        the cache held before.

    Raises:
        ConfigurationError: the cache does not report which slots are filled, or returns others.
    """
    name, length = type(cache).__name__, k.shape[1]
    if not hasattr(cache, "get_mask_sizes") or not hasattr(cache, "get_seq_length"):
        raise ConfigurationError(
            f"{name} is not supported as a cache of replaced attention: it does not report which slots are filled. Use "
            "DynamicCache or StaticCache, or the original model."
        )
    offset_of = getattr(cache, "get_query_offset", cache.get_seq_length)
    held, offset = int(cache.get_seq_length(layer_index)), int(offset_of(layer_index))
    slots, first = (int(size) for size in cache.get_mask_sizes(length, layer_index))
    keys, values = (t.transpose(1, 2) for t in cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_index))
    filled = offset + length - first
    if keys.shape[1] != slots or not length <= filled <= slots:
        raise ConfigurationError(
            f"{name} returned unexpected keys to attention layer {layer_index}: got {keys.shape[1]} slots, expected "
            f"{slots}, of which {filled} are filled. Use DynamicCache or StaticCache, or a longer cache."
        )
    return keys[:, :filled], values[:, :filled], held


def note_packed(cache: Any, held: int, packed: bool) -> None:
    """Record whether a cache holds several sequences in a row.

    Raises:
        ConfigurationError: a call continues such a row; its tokens would see all of the sequences.
    """
    if held == 0:
        if packed or hasattr(cache, _PACKED):
            setattr(cache, _PACKED, packed)
    elif packed or getattr(cache, _PACKED, False):
        raise ConfigurationError(
            f"{type(cache).__name__} cannot continue a packed row: got {held} cached tokens and the boundaries of "
            "several sequences, expected one sequence in each row. Put each sequence into a separate row."
        )
