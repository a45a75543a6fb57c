"""A sampled completion, and the sampling parameters that one can be requested with."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyshard.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion.

    Attributes:
        prompt: token IDs of the prompt.
        tokens: sampled token IDs, including the stop token.
        logprobs: log-probability of each sampled token, as the engine returned it.
        finished: whether the model ended the completion; False if it reached the length limit.
        version: version of the weights that sampled the last token.
        versions: version of the weights that sampled each token. A completion that was interrupted by a sync has
            several.
        routing: of an engine with `return_routing=True`, the experts that all tokens but the last took: int64
            `[tokens - 1, experts per token]` by layer; see `packed_routing`. None otherwise.

    Examples:
        >>> rollout = Rollout(prompt=(1, 2), tokens=(7, 3), logprobs=(-0.5, -1.0), finished=True, version="4")
        >>> torch.tensor(rollout.logprobs).sum()  # log-probability of the completion
        tensor(-1.5000)
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    version: str
    versions: tuple[str, ...] = ()
    routing: Mapping[str, torch.Tensor] | None = None


_UNSUPPORTED = {
    "n": "use samples=",
    "logprobs": "a Rollout holds the log-probability of each sampled token and of no other",
    "prompt_logprobs": "a Rollout holds log-probabilities of sampled tokens only; use ps.token_logprobs for prompts",
    "logprob_token_ids": "a Rollout holds the log-probability of each sampled token and of no other",
    "detokenize": "a Rollout holds token IDs",
    "output_kind": "a Rollout is a finished completion",
}


def check_sampling(sampling: dict[str, Any], *, known: bool = True) -> None:
    """Raise `ConfigurationError` for sampling parameters that vLLM lacks or whose results a `Rollout` does not hold.

    Args:
        sampling: the parameters.
        known: whether to look for parameters that vLLM lacks, which imports vLLM. Else the engine rejects them.
    """
    for name in sampling:
        if name in _UNSUPPORTED:
            raise ConfigurationError(
                f"RolloutEngine.generate does not take {name}={sampling[name]!r}: {_UNSUPPORTED[name]}"
            )
    if known:
        check_known(sampling)


def check_known(sampling: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for sampling parameters that vLLM lacks."""
    from vllm import SamplingParams

    known = set(inspect.signature(SamplingParams).parameters) - set(_UNSUPPORTED)
    for name in sampling:
        if name not in known:
            raise ConfigurationError(
                f"unknown sampling parameter {name!r}: expected samples or one of {', '.join(sorted(known))}"
            )
    refuse_stop_strings(sampling)


def refuse_stop_strings(sampling: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` for stop strings: vLLM looks for them in text, which is not requested."""
    if sampling.get("stop"):
        raise ConfigurationError(
            f"stop={sampling['stop']!r} is unsupported: engines return token IDs and look for no text. Use "
            "stop_token_ids=, or cut the completions where the text appears."
        )


def refuse_chunked_seeds(llm: Any, sampling: Mapping[str, Any], prompts: Sequence[Sequence[int]], samples: int) -> None:
    """Raise `ConfigurationError` for seeded prompts that vLLM may split into chunks: its CPU engine would end."""
    from polyshard.adapters.vllm import compat

    limit = compat.seeded_tokens_per_step(llm) if sampling.get("seed") is not None else None
    tokens = samples * sum(len(prompt) + 1 for prompt in prompts)  # a step has sampled tokens beside prompts
    if limit is not None and tokens > limit:
        raise ConfigurationError(
            f"seed={sampling['seed']} is unsupported for these prompts: got {tokens} tokens for {len(prompts)} prompts "
            f"and samples={samples}, expected at most max_num_batched_tokens={limit}. vLLM on CPU dies if it computes "
            "a prompt with a seed in parts. Start the engine with enable_chunked_prefill=False, or leave out the seed."
        )


def checked_prompts(prompts: Iterable[Iterable[Any]], samples: int) -> list[list[int]]:
    """Return prompts as lists of token IDs, which may be elements of tensors or arrays.

    Raises:
        ConfigurationError: a prompt is empty or holds something else, or there are no samples.
    """
    if samples < 1:
        raise ConfigurationError(f"samples is invalid: got {samples}, expected at least 1.")
    try:
        token_ids = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise ConfigurationError(
            f"the prompts are invalid: {error}. Expected a list of token IDs for each prompt. Tokenize texts first."
        ) from None
    if not all(token_ids):
        raise ConfigurationError(f"prompt {token_ids.index([])} of {len(token_ids)} is empty")
    return token_ids
