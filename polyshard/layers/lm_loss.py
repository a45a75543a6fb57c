"""The head and its loss in chunks of tokens: logits of all tokens are never in memory at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.layers.logprobs import token_logprobs
from polyshard.layers.vocabulary import mean_loss, vocab_parallel_cross_entropy

Head = Callable[[torch.Tensor], torch.Tensor]

CHUNK_TOKENS = 1024


def lm_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Compute the cross-entropy of `head(hidden)` without the logits of all tokens in memory.

    The losses of tokens are those of `vocab_parallel_cross_entropy`, bit for bit. The backward pass computes the logits
    of each chunk again: the head's matrix product runs four times per step and not three.

    Args:
        hidden: `[..., hidden]`, replicated over the tensor axis.
        head: gives this rank's logits `[tokens, local vocabulary]` of `[tokens, hidden]`, such as the layer of
            `polyshard.lm_head` or a model's `compute_logits`.
        labels: `[...]`, the token after each token; `ignore_index` where none counts.
        parallel_context: the parallel context.
        vocab_size: logical size, if the vocabulary is padded.
        ignore_index: as in torch.
        reduction: `"mean"`, `"sum"` or `"none"`, as in `vocab_parallel_cross_entropy`.
        label_smoothing: as in torch.
        chunk_tokens: tokens whose logits are in memory at once.

    Returns:
        A scalar, or `[...]` with `"none"`; float32 (float64 for float64 logits).

    Raises:
        ConfigurationError: the chunk size is not positive, or sequence parallel shards `hidden`.
        ValueError: as `vocab_parallel_cross_entropy`.

    Example:
        >>> context = ps.initialize("torch")
        >>> head = ps.lm_head(4, 8, context)
        >>> hidden, labels = torch.randn(6, 4), torch.tensor([1, 2, 3, 4, 5, -100])
        >>> chunked = ps.lm_loss(hidden, head, labels, context, chunk_tokens=2)
        >>> torch.equal(chunked, ps.vocab_parallel_cross_entropy(head(hidden), labels, context))
        True
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is invalid: got {reduction!r}, expected 'mean', 'sum' or 'none'")

    def losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(
            head(hidden),
            labels,
            parallel_context,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    found = _in_chunks(losses, hidden, labels, parallel_context, chunk_tokens)
    if reduction == "none":
        return found
    if reduction == "sum":
        return found.sum()
    return mean_loss(found.sum(), (labels != ignore_index).sum(), parallel_context.axis("context"))


def lm_logprobs(
    hidden: torch.Tensor,
    head: Head,
    token_ids: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Compute `token_logprobs` of `head(hidden)` without the logits of all tokens in memory; equal bit for bit.

    Args:
        hidden: `[..., hidden]`, replicated over the tensor axis.
        head: gives this rank's logits; see `lm_loss`.
        token_ids: `[...]`, the token after each position.
        parallel_context: the parallel context.
        vocab_size: logical size, if the vocabulary is padded.
        temperature: the sampling temperature; see `token_logprobs`.
        chunk_tokens: tokens whose logits are in memory at once.

    Returns:
        float32 `[...]`, the same on every tensor-parallel rank.

    Raises:
        ConfigurationError: the chunk size is not positive, or sequence parallel shards `hidden`.

    Example:
        >>> context = ps.initialize("torch")
        >>> head = ps.lm_head(4, 8, context)
        >>> hidden, ids = torch.randn(6, 4), torch.arange(6)
        >>> chunked = ps.lm_logprobs(hidden, head, ids, context, chunk_tokens=4)
        >>> torch.equal(chunked, ps.token_logprobs(head(hidden), ids, context))
        True
    """

    def logprobs(hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return token_logprobs(head(hidden), token_ids, parallel_context, vocab_size=vocab_size, temperature=temperature)

    return _in_chunks(logprobs, hidden, token_ids, parallel_context, chunk_tokens)


def _in_chunks(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    ids: torch.Tensor,
    context: ParallelContext,
    chunk_tokens: int,
) -> torch.Tensor:
    """Return `compute(hidden, ids)` `[...]`, whose logits are computed again in the backward pass."""
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ConfigurationError(f"chunk_tokens is invalid: got {chunk_tokens!r}, expected a positive integer.")
    if context.layout.sequence_parallel and context.get_tensor_parallel_world_size() > 1:
        raise ConfigurationError(
            "chunks of tokens are unsupported with sequence parallel: the head gathers the sequence of each chunk. "
            "Compute the loss of all tokens with vocab_parallel_cross_entropy."
        )
    if hidden.shape[:-1] != ids.shape:
        raise ConfigurationError(
            f"labels have the wrong shape: got {tuple(ids.shape)}, expected {tuple(hidden.shape[:-1])}, that of the "
            "hidden states without the last dimension."
        )
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    parts = zip(rows.split(chunk_tokens), flat.split(chunk_tokens))
    if torch.is_grad_enabled():
        found = [checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        found = [compute(*part) for part in parts]
    return torch.cat(found).view(ids.shape)
