"""The batch of the step that a model runs, from vLLM's forward context."""

from __future__ import annotations

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available

_FIELDS = ("query_start_loc", "block_table", "slot_mapping")


def batch_of_step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return query bounds `[sequences + 1]`, block table `[sequences, blocks]`, and cache slots `[tokens]`.

    None in a run without requests, by which vLLM measures memory.

    Raises:
        NotImplementedError: the attention backend has other metadata.
    """
    metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
    if not metadata:
        return None
    first = metadata[min(metadata)] if isinstance(metadata, dict) else metadata
    found = tuple(getattr(first, name, None) for name in _FIELDS)
    if not all(isinstance(tensor, torch.Tensor) for tensor in found):
        raise NotImplementedError(f"{type(first).__name__} has no {', '.join(_FIELDS)}")
    return found  # pyrefly: ignore  # checked
