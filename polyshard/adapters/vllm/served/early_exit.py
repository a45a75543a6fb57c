"""Whether what follows the last attention waits for the tokens that are sampled."""

from __future__ import annotations

from torch import nn

from polyshard.adapters.vllm.compat import VllmConfig, captures_graphs
from polyshard.core.serving import forward_takes

_DRAFT_FROM_TOKENS = ("ngram", "suffix")  # the others are given the target's hidden states


def finished_later(model: nn.Module, vllm_config: VllmConfig) -> bool:
    """Whether vLLM is to be given what the model's `finish` takes, and `compute_logits` finishes the rows it is given.

    All that vLLM then does with hidden states is to choose rows for `compute_logits`, unless it drafts from them. LoRA
    adapters are chosen for all tokens of a batch, in order, and not for some. Captured graphs hold the forward alone:
    what is outside is launched anew for each token, and what that costs was not measured.
    """
    speculative = vllm_config.speculative_config
    return (
        forward_takes(model, "finish")
        and (speculative is None or speculative.method in _DRAFT_FROM_TOKENS)
        and vllm_config.lora_config is None
        and not captures_graphs(vllm_config)
    )
