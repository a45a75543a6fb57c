"""Cross-entropy over logits that are sharded along the vocabulary, without gathering them."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from polyshard.core.context import ParallelAxis
from polyshard.native import cross_entropy as native


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The loss of each token, `[tokens]`, from local logits `[tokens, local vocabulary]`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        axis: ParallelAxis,
        vocab_size: int,
        ignore_index: int,
        smoothing: float,
    ) -> torch.Tensor:
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
        probabilities = weights.div_(normalizer.unsqueeze(-1))
        ctx.save_for_backward(probabilities, index, here, ignored)
        ctx.smoothing, ctx.vocab_size, ctx.real, ctx.dtype = smoothing, vocab_size, real, logits.dtype
        return loss.masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probabilities, index, here, ignored = ctx.saved_tensors
        gradient = probabilities.clone()
        if ctx.smoothing:
            gradient[..., : ctx.real] -= ctx.smoothing / ctx.vocab_size
        gradient.scatter_add_(-1, index, -(1.0 - ctx.smoothing) * here.unsqueeze(-1).to(gradient.dtype))
        scale = gradients[0].masked_fill(ignored, 0.0).unsqueeze(-1)
        return gradient.mul_(scale).to(ctx.dtype), None, None, None, None, None


class _NativeCrossEntropy(torch.autograd.Function):
    """The same by native kernels, which keep no probabilities; without label smoothing."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, axis: ParallelAxis, ignore_index: int
    ) -> torch.Tensor:
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
        ctx.save_for_backward(logits, top, normalizer, columns, ignored)
        return (normalizer.log() - target_logit).masked_fill(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        logits, top, normalizer, columns, ignored = ctx.saved_tensors
        scale = gradients[0].masked_fill(ignored, 0.0)
        return native.gradient(logits, top, normalizer, scale, columns), None, None, None


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
    flat = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1)
    if not label_smoothing and not torch.compiler.is_compiling() and native.supports(flat):
        losses = _NativeCrossEntropy.apply(flat, flat_targets, axis, ignore_index)
    else:
        losses = _VocabParallelCrossEntropy.apply(flat, flat_targets, axis, vocab_size, ignore_index, label_smoothing)
    return losses.view(targets.shape)
