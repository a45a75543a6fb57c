"""A wrapper for a library's cross-entropy that works in place and does not support ignored targets."""

from __future__ import annotations

from collections.abc import Callable

import torch


def token_losses(
    library_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int,
) -> torch.Tensor:
    """Return the loss of each token, `[...]`; 0 for ignored targets.

    Args:
        library_loss: `(logits [tokens, local vocabulary] float32, targets [tokens]) -> [tokens]`.
        logits: `[..., local vocabulary]`; not modified.
        targets: `[...]`.
        ignore_index: target that contributes neither loss nor gradient.
    """
    flat_targets = targets.reshape(-1)
    flat = logits.reshape(-1, logits.shape[-1])
    wide = flat.clone() if flat.dtype == torch.float64 else flat.to(torch.float32, copy=True)
    ignored = flat_targets == ignore_index
    losses = library_loss(wide, flat_targets.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
    return losses.view(targets.shape)
