"""Log-probabilities of given tokens, which an RL trainer compares with those of its server."""

from __future__ import annotations

import math
import numbers

import torch

from polyshard.core.context import ParallelContext
from polyshard.layers.differentiable import gather_last
from polyshard.layers.token_ids import check_labels, check_of_logits, check_present
from polyshard.layers.vocabulary import token_losses

_NO_LABEL = -(2**62)  # not a token ID, so that no label is ignored


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return the log-probability of each token under the logits at its position; differentiable.

    In exact mode the arithmetic is that of vLLM's sampler: `log_softmax` over the full vocabulary in float32, on every
    tensor-parallel rank. Otherwise the logits stay sharded.

    Args:
        logits: `[..., local vocabulary]`, as returned by `polyshard.lm_head`; not modified.
        token_ids: `[...]`, the token after each position.
        parallel_context: the parallel context.
        vocab_size: logical size, if the vocabulary is padded.
        temperature: the sampling temperature. The server reports log-probabilities at temperature 1 for any sampling
            temperature, unless it is started with `logprobs_mode="processed_logprobs"`.

    Returns:
        float32 `[...]`, the same on every tensor-parallel rank.

    Raises:
        ValueError: a token ID is outside the vocabulary (on a GPU, an asynchronous assertion), IDs have another shape
            or are no integers, `vocab_size` is larger than the logits, or the temperature is not positive.

    Examples:
        >>> context = ps.initialize("torch")
        >>> ps.token_logprobs(torch.zeros(2, 4), torch.tensor([1, 3]), context)
        tensor([-1.3863, -1.3863])
    """
    ranks = parallel_context.get_tensor_parallel_world_size()
    check_of_logits(token_ids, logits, vocab_size, ranks)
    if not isinstance(temperature, numbers.Real) or not 0.0 < temperature < math.inf:
        raise ValueError(
            f"temperature is invalid: got {temperature!r}, expected a positive number. For greedy sampling pass 1.0, "
            "at which servers report its log-probabilities."
        )
    size = vocab_size or logits.shape[-1] * ranks
    check_labels(token_ids, size, None)
    if parallel_context.exact is None:
        scaled = logits if temperature == 1.0 else logits.float() / temperature
        losses, _ = token_losses(scaled, token_ids, parallel_context, vocab_size=vocab_size, ignore_index=_NO_LABEL)
        return -losses
    full = gather_last(logits, parallel_context.axis("tensor"))[..., :vocab_size]
    if temperature != 1.0:
        full = full.float() / full.new_full((1,), temperature, dtype=torch.float32)  # as vLLM's sampler
    all_logprobs = full.log_softmax(-1, dtype=torch.float32)
    logprobs = all_logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    if vocab_size is None:
        check_present(-logprobs, token_ids)
    return logprobs
