"""Cross-entropy over logits that are sharded along the vocabulary, without gathering them."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from polyshard.core.context import ParallelAxis
from polyshard.native import cross_entropy as native


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Loss and log-sum-exp of each token, `[tokens]`, from local logits `[tokens, local vocabulary]`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        axis: ParallelAxis,
        vocab_size: int,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        length = wide.shape[-1]
        start = axis.rank * length
        real = max(0, min(vocab_size - start, length))
        ignored = targets == ignore_index

        top = wide.amax(-1)
        if axis.size > 1:
            assert axis.collectives is not None
            top = axis.collectives.all_reduce(top, "max")
        shifted = wide - top.unsqueeze(-1)

        local = targets - start
        here = (local >= 0) & (local < length) & ~ignored
        index = local.masked_fill(~here, 0).unsqueeze(-1)
        target_logit = shifted.gather(-1, index).squeeze(-1).masked_fill(~here, 0.0)
        total = shifted[..., :real].sum(-1) if smoothing else torch.zeros_like(target_logit)
        weights = shifted.exp_()
        normalizer = weights.sum(-1)
        if axis.size > 1:
            assert axis.collectives is not None
            sums = axis.collectives.all_reduce(torch.stack((target_logit, normalizer, total)))
            target_logit, normalizer, total = sums.unbind(0)

        log_normalizer = normalizer.log()
        loss = log_normalizer - target_logit
        if smoothing:
            loss = (1.0 - smoothing) * loss + smoothing * (log_normalizer - total / vocab_size)
        log_sum = top + log_normalizer
        if z_loss:
            loss = loss + z_loss * log_sum.square()
        probabilities = weights.div_(normalizer.unsqueeze(-1))
        ctx.save_for_backward(probabilities, index, here, ignored, log_sum)
        ctx.mark_non_differentiable(log_sum)
        ctx.z_loss = z_loss
        ctx.smoothing, ctx.vocab_size, ctx.real, ctx.dtype = smoothing, vocab_size, real, logits.dtype
        return loss.masked_fill(ignored, 0.0), log_sum

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities, index, here, ignored, log_sum = ctx.saved_tensors
        # d logsumexp / d logits are the probabilities.
        of_square = 1.0 + 2.0 * ctx.z_loss * log_sum
        gradient = probabilities * of_square.unsqueeze(-1) if ctx.z_loss else probabilities.clone()
        if ctx.smoothing:
            gradient[..., : ctx.real] -= ctx.smoothing / ctx.vocab_size
        gradient.scatter_add_(-1, index, -(1.0 - ctx.smoothing) * here.unsqueeze(-1).to(gradient.dtype))
        scale = gradients[0].masked_fill(ignored, 0.0).unsqueeze(-1)
        return gradient.mul_(scale).to(ctx.dtype), None, None, None, None, None, None


class _NativeCrossEntropy(torch.autograd.Function):
    """The same by native kernels, which keep no probabilities; without label smoothing."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, axis: ParallelAxis, ignore_index: int, z_loss: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = logits.shape[-1]
        ignored = targets == ignore_index
        local = targets - axis.rank * length
        columns = local.masked_fill(ignored | (local < 0) | (local >= length), -1)
        top = native.largest(logits)
        if axis.size > 1:
            assert axis.collectives is not None
            top = axis.collectives.all_reduce(top, "max")
        target_logit = logits.gather(-1, columns.clamp(min=0).unsqueeze(-1)).squeeze(-1).float() - top
        target_logit, normalizer = target_logit.masked_fill(columns < 0, 0.0), native.sum_exp(logits, top)
        if axis.size > 1:
            assert axis.collectives is not None
            target_logit, normalizer = axis.collectives.all_reduce(torch.stack((target_logit, normalizer))).unbind(0)
        log_normalizer = normalizer.log()
        loss, log_sum = log_normalizer - target_logit, top + log_normalizer
        if z_loss:
            loss = loss + z_loss * log_sum.square()
        ctx.save_for_backward(logits, top, normalizer, columns, ignored, log_sum)
        ctx.mark_non_differentiable(log_sum)
        ctx.z_loss = z_loss
        return loss.masked_fill(ignored, 0.0), log_sum

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        logits, top, normalizer, columns, ignored, log_sum = ctx.saved_tensors
        scale = gradients[0].masked_fill(ignored, 0.0)
        if not ctx.z_loss:
            return native.gradient(logits, top, normalizer, scale, columns), None, None, None, None
        # The kernel multiplies probabilities and the label's 1 by one factor; the square does not depend on the label.
        of_square = scale * 2.0 * ctx.z_loss * log_sum
        gradient = native.gradient(logits, top, normalizer, scale + of_square, columns)
        added = of_square.masked_fill(columns < 0, 0.0).to(gradient.dtype)
        return (
            gradient.scatter_add_(-1, columns.clamp(min=0).unsqueeze(-1), added.unsqueeze(-1)),
            None,
            None,
            None,
            None,
        )


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    axis: ParallelAxis,
    *,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """Return the loss of each token; see `polyshard.vocab_parallel_cross_entropy`, which checks the arguments."""
    settings = {"vocab_size": vocab_size, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return cross_entropy_with_z_loss(logits, targets, axis, z_loss=0.0, **settings)[0]


def cross_entropy_with_z_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    axis: ParallelAxis,
    *,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token with `z_loss` times the square of the log-sum-exp, and this part, detached."""
    flat = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1)
    losses: torch.Tensor
    if not label_smoothing and not torch.compiler.is_compiling() and native.supports(flat):
        losses, log_sum = _NativeCrossEntropy.apply(flat, flat_targets, axis, ignore_index, z_loss)
    else:
        losses, log_sum = _VocabParallelCrossEntropy.apply(
            flat, flat_targets, axis, vocab_size, ignore_index, label_smoothing, z_loss
        )
    squares = (z_loss * log_sum.square()).masked_fill(flat_targets == ignore_index, 0.0)
    return losses.view(targets.shape), squares.view(targets.shape)
