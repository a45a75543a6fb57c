"""polyshard's contract of cross-entropy around a library's loss per token."""

from __future__ import annotations

from collections.abc import Callable

import torch


def token_losses(
    library_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """Loss by a library whose function works in place, knows no ignored targets, and does not check them.

    Args:
        library_loss: `(logits [tokens, local vocabulary] float32, targets [tokens]) -> [tokens]`.
        logits: `[..., local vocabulary]`; left untouched.
        targets: `[...]`.
        vocab_size: logical size.
        ignore_index: left out of loss, gradient and mean.
        reduction: `mean`, `sum` or `none`.
    """
    flat_targets = targets.reshape(-1)
    check_targets(flat_targets, vocab_size, ignore_index)
    flat = logits.reshape(-1, logits.shape[-1])
    wide = flat.clone() if flat.dtype == torch.float64 else flat.to(torch.float32, copy=True)
    ignored = flat_targets == ignore_index
    losses = library_loss(wide, flat_targets.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (~ignored).sum().clamp_min(1)


def check_targets(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise `ValueError` for a target outside the vocabulary; on CPU alone: on CUDA it would wait for the device."""
    if targets.device.type != "cpu":
        return
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"target {int(targets[wrong][0])} is outside the vocabulary of {vocab_size} "
            f"and is not ignore_index ({ignore_index})"
        )
