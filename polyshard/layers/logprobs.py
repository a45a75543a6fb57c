"""Log-probabilities of given tokens: what a policy's trainer compares with its server's."""

from __future__ import annotations

import torch

from polyshard.core.context import ParallelContext
from polyshard.layers.differentiable import gather_last
from polyshard.layers.token_ids import check_labels, check_present
from polyshard.layers.vocabulary import token_losses

_NO_LABEL = -(2**62)  # no token has this ID, and none is ignored


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    parallel_context: ParallelContext,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probability of each token under the logits that stand at its place; differentiable.

    In exact mode the arithmetic is that of vLLM's sampler: the whole vocabulary's `log_softmax` in float32, on every
    tensor-parallel rank. Otherwise the logits stay sharded.

    Args:
        logits: `[..., local vocabulary]`, as `polyshard.lm_head` gives them; left untouched.
        token_ids: `[...]`; the token that followed.
        parallel_context: where this process stands.
        vocab_size: logical size, where the vocabulary is padded.
        temperature: that the tokens were sampled with. The server tells log-probabilities at temperature 1 whatever
            it samples with, unless it is started with `logprobs_mode="processed_logprobs"`.

    Returns:
        float32 `[...]`, the same on every tensor-parallel rank.

    Raises:
        ValueError: a token ID outside the vocabulary (on a GPU an asynchronous assertion).
    """
    size = vocab_size or logits.shape[-1] * parallel_context.get_tensor_parallel_world_size()
    check_labels(token_ids, size, None)
    if parallel_context.exact is None:
        scaled = logits if temperature == 1.0 else logits.float() / temperature
        return -token_losses(scaled, token_ids, parallel_context, vocab_size=vocab_size, ignore_index=_NO_LABEL)
    whole = gather_last(logits, parallel_context.axis("tensor"))[..., :vocab_size]
    if temperature != 1.0:
        whole = whole.float() / whole.new_full((1,), temperature, dtype=torch.float32)  # as the sampler: by a tensor
    everything = whole.log_softmax(-1, dtype=torch.float32)
    logprobs = everything.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    if vocab_size is None:
        check_present(-logprobs, token_ids)
    return logprobs
