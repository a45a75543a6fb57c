"""The head and its loss in chunks of tokens: logits of all tokens are never in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch.utils.checkpoint import checkpoint

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.layers.forward_gradients import sum_with_gradients
from polyshard.layers.logprobs import token_logprobs
from polyshard.layers.vocabulary import check_z_loss, mean_loss, vocab_parallel_cross_entropy

Head = Callable[[torch.Tensor], torch.Tensor]

CHUNK_TOKENS = 1024


@overload
def lm_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    return_z_loss: Literal[False] = ...,
    chunk_tokens: int = ...,
) -> torch.Tensor: ...


@overload
def lm_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    return_z_loss: Literal[True],
    chunk_tokens: int = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


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
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy of `head(hidden)` without the logits of all tokens in memory.

    The losses of tokens are those of `vocab_parallel_cross_entropy`, bit for bit. For a sum or a mean, the gradients of
    each chunk are computed right after its logits, and the backward pass scales them; the head's gradient is
    accumulated in float32 or wider. For unreduced losses, and if the library moves the head's weights between calls
    (ZeRO stage 3), the backward pass computes the logits again.

    Args:
        hidden: `[..., hidden]`, replicated over the tensor axis, or sharded along the sequence
            `[..., tokens / size, hidden]` under sequence parallel.
        head: gives this rank's logits `[tokens, local vocabulary]` of `[tokens, hidden]`, such as the layer of
            `polyshard.lm_head` or a model's `compute_logits`.
        labels: `[...]`, the token after each token; `ignore_index` where none counts.
        parallel_context: the parallel context.
        vocab_size: logical size, if the vocabulary is padded.
        ignore_index: as in torch.
        reduction: `"mean"`, `"sum"` or `"none"`, as in `vocab_parallel_cross_entropy`.
        label_smoothing: as in torch.
        z_loss: factor of the square of the logits' log-sum-exp, added to each token's loss.
        return_z_loss: also return the part of the loss that is the z-loss, detached, reduced in the same way.
        chunk_tokens: tokens whose logits are in memory at once.

    Returns:
        A scalar, or `[...]` with `"none"`; float32 (float64 for float64 logits). With `return_z_loss`, a pair of these.

    Raises:
        ConfigurationError: the chunk size is not positive, or labels and hidden states have different shapes.
        ValueError: as `vocab_parallel_cross_entropy`.

    Examples:
        >>> context = ps.initialize("torch")
        >>> head = ps.lm_head(4, 8, context)
        >>> hidden, labels = torch.randn(6, 4), torch.tensor([1, 2, 3, 4, 5, -100])
        >>> chunked = ps.lm_loss(hidden, head, labels, context, chunk_tokens=2)
        >>> torch.equal(chunked, ps.vocab_parallel_cross_entropy(head(hidden), labels, context))
        True
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is invalid: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    check_z_loss(z_loss)
    squares: list[torch.Tensor] = []  # z-losses of the chunks

    def losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found, square = vocab_parallel_cross_entropy(
            head(hidden),
            labels,
            parallel_context,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            return_z_loss=True,
        )
        if return_z_loss:
            squares.append(square)
        return found

    def reduced(total: torch.Tensor) -> torch.Tensor:
        if reduction == "sum":
            return total
        return mean_loss(total, (labels != ignore_index).sum(), parallel_context.axis("context"))

    chunks = _Chunks.of(hidden, labels, parallel_context, chunk_tokens)
    total: torch.Tensor | None = None
    if reduction != "none" and torch.is_grad_enabled():
        total = sum_with_gradients(losses, hidden, chunks.rows, chunks.ids)
    if total is not None:
        found = reduced(total)
    else:
        squares.clear()  # of chunks that are computed once more
        each = _each(losses, chunks)
        found = each if reduction == "none" else reduced(each.sum())
    if not return_z_loss:
        return found
    each = chunks.joined(squares)
    return found, each if reduction == "none" else reduced(each.sum())


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
        hidden: `[..., hidden]`, replicated over the tensor axis, or sharded under sequence parallel.
        head: gives this rank's logits; see `lm_loss`.
        token_ids: `[...]`, the token after each position.
        parallel_context: the parallel context.
        vocab_size: logical size, if the vocabulary is padded.
        temperature: the sampling temperature; see `token_logprobs`.
        chunk_tokens: tokens whose logits are in memory at once.

    Returns:
        float32 `[...]`, the same on every tensor-parallel rank.

    Raises:
        ConfigurationError: the chunk size is not positive, or IDs and hidden states have different shapes.

    Examples:
        >>> context = ps.initialize("torch")
        >>> head = ps.lm_head(4, 8, context)
        >>> hidden, ids = torch.randn(6, 4), torch.arange(6)
        >>> chunked = ps.lm_logprobs(hidden, head, ids, context, chunk_tokens=4)
        >>> torch.equal(chunked, ps.token_logprobs(head(hidden), ids, context))
        True
    """

    def logprobs(hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return token_logprobs(head(hidden), token_ids, parallel_context, vocab_size=vocab_size, temperature=temperature)

    return _each(logprobs, _Chunks.of(hidden, token_ids, parallel_context, chunk_tokens))


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Hidden states and IDs in chunks of tokens.

    Attributes:
        rows: hidden states `[..., tokens of the chunk on this rank, hidden]`; views.
        ids: `[..., tokens of the chunk on all ranks]`, in the order in which the head gathers them.
        shape: of all IDs.
        ranks: over which sequence parallel shards the tokens; 1 without it.
    """

    rows: tuple[torch.Tensor, ...]
    ids: tuple[torch.Tensor, ...]
    shape: torch.Size
    ranks: int

    @classmethod
    def of(cls, hidden: torch.Tensor, ids: torch.Tensor, context: ParallelContext, chunk_tokens: int) -> _Chunks:
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ConfigurationError(f"chunk_tokens is invalid: got {chunk_tokens!r}, expected a positive integer.")
        if not isinstance(hidden, torch.Tensor) or not isinstance(ids, torch.Tensor):
            wrong, got = ("labels", ids) if isinstance(hidden, torch.Tensor) else ("hidden states", hidden)
            raise ConfigurationError(f"{wrong} are no tensor: got {type(got).__name__}. Check the order of arguments.")
        ranks = context.get_tensor_parallel_world_size() if context.layout.sequence_parallel else 1
        expected = hidden.shape[:-1] if ranks == 1 else (*hidden.shape[:-2], hidden.shape[-2] * ranks)
        if ids.shape != tuple(expected):
            raise ConfigurationError(
                f"labels have the wrong shape: got {tuple(ids.shape)}, expected {tuple(expected)}, that of the hidden "
                "states without the last dimension."
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ConfigurationError(f"labels have the wrong dtype: got {ids.dtype}, expected torch.int64.")
        ids = ids.long()
        if ranks == 1:
            flat = hidden.reshape(-1, hidden.shape[-1])
            return cls(flat.split(chunk_tokens), ids.reshape(-1).split(chunk_tokens), ids.shape, 1)
        # The head gathers a chunk over the ranks: its tokens are those of rank 0, then those of rank 1, ...
        sequences = hidden.shape[:-2].numel()
        length = max(1, chunk_tokens // (ranks * max(1, sequences)))
        by_rank = ids.unflatten(-1, (ranks, hidden.shape[-2]))
        parts = tuple(part.flatten(-2) for part in by_rank.split(length, dim=-1))
        return cls(hidden.split(length, dim=-2), parts, ids.shape, ranks)

    def joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the figures of all tokens, in the shape of the IDs, from those of the chunks."""
        if self.ranks == 1:
            return torch.cat(parts).view(self.shape)
        return torch.cat([part.unflatten(-1, (self.ranks, -1)) for part in parts], dim=-1).flatten(-2)


def _each(compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], chunks: _Chunks) -> torch.Tensor:
    """Return a figure of each token in the shape of the IDs; the backward pass computes the logits again."""
    parts = zip(chunks.rows, chunks.ids)
    if torch.is_grad_enabled():
        found = [checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        found = [compute(*part) for part in parts]
    return chunks.joined(found)
