"""The masks that transformers' models pass to polyshard's attention: per key if that is sufficient, otherwise dense.

Source: transformers 5, masking_utils (`flash_attention_mask`, `sdpa_mask`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polyshard.core.errors import ConfigurationError

_CUT = "polyshard_cut"  # attribute set on a mask that begins at the cache's first slot
# Patterns that kernels implement, identified by the closures' names; any other pattern gets a dense mask.
_KNOWN = frozenset(
    {
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay.<locals>.inner_mask",
        "sliding_window_bidirectional_overlay.<locals>.inner_mask",
        "packed_sequence_mask_function.<locals>.inner_mask",
    }
)
_COMPOSED = frozenset({"and_masks.<locals>.and_mask", "remap_positions_for_packed_sequence.<locals>.inner_mask"})


def slot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor | None:
    """Return the mask of a call in its most compact form.

    Args:
        batch_size: number of rows.
        q_length: queries of each row.
        kv_length: key slots that the cache returns, filled or not.
        q_offset: position of the first query.
        kv_offset: position of the first key slot.
        mask_function: transformers' function of (row, head, query position, key position).
        attention_mask: `[batch, tokens]`, True for tokens that count, from position 0.
        options: further arguments of transformers' `sdpa_mask`.

    Returns:
        None if the queries are the last keys and all keys count. `[batch, keys]`, the slots up to the last query, if
        tokens are masked or the cache has empty slots. `[batch, 1, queries, keys]` if the kernels do not support the
        pattern.

    Raises:
        ConfigurationError: the mask does not cover the tokens of the call.
    """
    used = int(q_offset) + q_length - int(kv_offset)
    # Without a cache this mask does not match the keys; with one it covers empty slots. Only a dense mask is
    # unambiguous.
    unclear = attention_mask is not None and used < kv_length == attention_mask.shape[1]
    if unclear or (mask_function is not None and not _is_known(mask_function)) or used > kv_length:
        from transformers.masking_utils import causal_mask_function, sdpa_mask

        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # pyrefly: ignore  # an int or a tensor, as transformers calls it
            kv_offset=kv_offset,  # pyrefly: ignore
            mask_function=mask_function or causal_mask_function,
            attention_mask=attention_mask,
            **options,
        )
    if attention_mask is None:
        if used == kv_length:
            return None
        counts = torch.ones(batch_size, used, dtype=torch.bool, device=options.get("device"))
        setattr(counts, _CUT, True)
        return counts
    if getattr(attention_mask, _CUT, False):  # `generate` creates masks, and the model then creates them again
        return attention_mask
    first, width = int(kv_offset), attention_mask.shape[1]
    if first and width < first + used:
        raise ConfigurationError(
            f"the attention mask is too short: got {width} tokens, expected the {first + used} of the cache and the "
            "call. Pass one entry for each token, including those that the cache has dropped."
        )
    counts = attention_mask[:, first : first + used].bool()
    counts = torch.nn.functional.pad(counts, (0, used - counts.shape[1]))  # tokens beyond the mask are masked
    if used == kv_length and (counts.is_meta or bool(counts.all())):  # a plan's tokens all count
        return None
    counts = counts.clone() if counts is attention_mask else counts
    setattr(counts, _CUT, True)
    return counts


def _is_known(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__qualname__", "")
    if name not in _COMPOSED:
        return name in _KNOWN
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [part for value in inside for part in (value if isinstance(value, tuple) else (value,)) if callable(part)]
    return bool(parts) and all(_is_known(part) for part in parts)
