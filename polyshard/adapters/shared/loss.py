"""A library's cross-entropy that works in place and knows no ignored targets, by polyshard's contract."""

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
    """Return the loss of each token, `[...]`; 0 for ignored ones.

    Args:
        library_loss: `(logits [tokens, local vocabulary] float32, targets [tokens]) -> [tokens]`.
        logits: `[..., local vocabulary]`; left untouched.
        targets: `[...]`.
        ignore_index: left out of loss and gradient.
    """
    flat_targets = targets.reshape(-1)
    flat = logits.reshape(-1, logits.shape[-1])
    wide = flat.clone() if flat.dtype == torch.float64 else flat.to(torch.float32, copy=True)
    ignored = flat_targets == ignore_index
    losses = library_loss(wide, flat_targets.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
    return losses.view(targets.shape)
