"""Whether an engine uses a model's early exit, and runs `finish` for sampled tokens only."""

from __future__ import annotations

from torch import nn

from polyshard.adapters.vllm.compat import VllmConfig, captures_graphs
from polyshard.core.serving import forward_takes

_DRAFT_FROM_TOKENS = ("ngram", "suffix")  # other methods read the target's hidden states


def uses_early_exit(model: nn.Module, vllm_config: VllmConfig) -> bool:
    """Whether forward ends after the last attention, and `compute_logits` calls `finish` on the rows it is given.

    This requires that vLLM uses hidden states only to select rows for `compute_logits`, so it is off where vLLM drafts
    from them. It is off with LoRA, which selects adapters for all tokens of a batch in order. It is also off with
    captured graphs: they contain only the forward pass, and the cost of launching `finish` outside was not measured.
    """
    speculative = vllm_config.speculative_config
    return (
        forward_takes(model, "finish")
        and (speculative is None or speculative.method in _DRAFT_FROM_TOKENS)
        and vllm_config.lora_config is None
        and not captures_graphs(vllm_config)
    )
