"""The layers of DeepSpeed's automatic tensor parallelism behind polyshard's `LinearAdapter`.

DeepSpeed's layers are created from an unsharded `nn.Linear`, whose parameter they slice in place.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.experts import ExpertBank
from polyshard.layers.head import PaddedHead, padded_size, tied_weight

logger = logging.getLogger(__name__)


def _whole_linear(input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool) -> nn.Module:
    """Return an unsharded layer drawn from torch's global generator: equal on ranks with equal seeds, at every size."""
    device = parallel_context.device
    if not parallel_context.initialize_weights:
        return nn.utils.skip_init(nn.Linear, input_size, output_size, bias=bias, device=device)
    layer = nn.Linear(input_size, output_size, bias=bias, device="cpu")
    nn.init.normal_(layer.weight, std=input_size**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer.to(device)


class DeepspeedLinearAdapter:
    """The `LinearAdapter` of DeepSpeed, which needs initialized communication; see `context.adopt`."""

    plain_outputs = True
    plain_products = True
    vocab_padding = 1
    smooths_labels = False  # DeepSpeed's loss does not support it

    def create_column_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return DeepSpeed's `LinearLayer`."""
        from polyshard.adapters.deepspeed.compat import LinearLayer

        whole = _whole_linear(input_size, output_size, parallel_context, bias)
        return LinearLayer(whole, mp_group=parallel_context.get_tensor_parallel_group())

    def create_row_parallel(
        self, input_size: int, output_size: int, parallel_context: ParallelContext, bias: bool = False
    ) -> nn.Module:
        """Return DeepSpeed's `LinearAllreduce`."""
        from polyshard.adapters.deepspeed.compat import LinearAllreduce

        whole = _whole_linear(input_size, output_size, parallel_context, bias)
        return LinearAllreduce(whole, parallel_context.get_tensor_parallel_group())

    def create_vocab_embedding(
        self, num_embeddings: int, embedding_dim: int, parallel_context: ParallelContext
    ) -> nn.Module:
        """Return DeepSpeed's `VocabParallelEmbedding`, padded to equal shards as in the weight layouts."""
        from polyshard.adapters.deepspeed.compat import VocabParallelEmbedding

        rows = padded_size(num_embeddings, parallel_context.axis("tensor"))
        whole: Any = nn.utils.skip_init(nn.Embedding, rows, embedding_dim, device=parallel_context.device)
        if parallel_context.initialize_weights:
            nn.init.normal_(whole.weight, std=0.02)
        return VocabParallelEmbedding(whole, parallel_context.get_tensor_parallel_group())

    def create_lm_head(
        self,
        hidden_size: int,
        vocab_size: int,
        parallel_context: ParallelContext,
        bias: bool = False,
        tied_to: nn.Module | None = None,
    ) -> nn.Module:
        """Return DeepSpeed's `VocabParallelLinear`."""
        from polyshard.adapters.deepspeed.compat import VocabParallelLinear

        axis = parallel_context.axis("tensor")
        whole = _whole_linear(hidden_size, padded_size(vocab_size, axis), parallel_context, bias)
        layer: Any = VocabParallelLinear(whole, parallel_context.get_tensor_parallel_group())
        if tied_to is not None:
            layer.weight = tied_weight(tied_to)
        return PaddedHead(layer, vocab_size, axis)

    def create_experts(self, bank: ExpertBank, parallel_context: ParallelContext) -> nn.Module:
        """Return DeepSpeed's dropless experts; torch's for experts that polyshard does not build with DeepSpeed's."""
        reason = _lacks(bank, parallel_context)
        if reason is not None:
            logger.info("torch's experts are used, not DeepSpeed's: %s", reason)
            return load_adapter("torch").linear.create_experts(bank, parallel_context)
        from polyshard.adapters.deepspeed.experts import DeepspeedExperts

        return DeepspeedExperts(bank, parallel_context)

    def vocab_parallel_cross_entropy(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        parallel_context: ParallelContext,
        *,
        vocab_size: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        """Return the loss from DeepSpeed's function, which supports ignored targets but not label smoothing."""
        assert not label_smoothing, "see smooths_labels"
        from polyshard.adapters.deepspeed.compat import vocab_parallel_cross_entropy

        axis = parallel_context.axis("tensor")
        length = logits.shape[-1]
        flat_targets = targets.reshape(-1)
        flat = logits.reshape(-1, length)
        losses = vocab_parallel_cross_entropy(
            flat if flat.dtype == torch.float64 else flat.float(),
            flat_targets,
            tp_group=parallel_context.get_tensor_parallel_group(),
            vocab_start_index=axis.rank * length,
            vocab_end_index=(axis.rank + 1) * length,
            global_vocab_size=axis.size * length,
            ignore_index=ignore_index,
            reduction="none",
        )
        return losses.view(targets.shape)


def _lacks(bank: ExpertBank, context: ParallelContext) -> str | None:
    """Return why DeepSpeed's experts cannot compute a bank; None if they can."""
    if context.exact is not None:
        return "exact mode replaces the matrix products of torch's"
    if bank.activation != "silu" or bank.bias or bank.scale_input:
        return "polyshard builds DeepSpeed's for SwiGLU without biases and scaled inputs only"
    if bank.storage.stacked is not None:
        return "DeepSpeed's weights are stored expert by expert"
    if context.layout.sequence_parallel and context.axis("tensor").size > 1:
        return "DeepSpeed has no sequence parallel"
    return None
