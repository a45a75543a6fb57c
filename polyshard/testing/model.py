"""The conformance suite's model: every kind of layer, with sizes divisible by 1, 2 and 4, except for the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.attention import RotaryEmbedding, TrainableFlashAttention
from polyshard.core.context import ParallelContext
from polyshard.layers.linear import column_parallel, row_parallel
from polyshard.layers.norm import rms_norm
from polyshard.layers.vocabulary import lm_head, vocab_embedding, vocab_parallel_cross_entropy


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """Sizes of the model. It has two KV heads, so that four tensor-parallel ranks must share them."""

    vocab_size: int = 29
    hidden_size: int = 32
    intermediate_size: int = 48
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    num_layers: int = 2
    tied: bool = False
    dropout: float = 0.0


class SuiteBlock(nn.Module):
    """Attention with biases, QK norm and rotary embedding, and a gated MLP with biases."""

    def __init__(self, config: SuiteConfig, context: ParallelContext) -> None:
        super().__init__()
        h, f = config.hidden_size, config.intermediate_size
        self.norm1, self.norm2 = rms_norm(h, context), rms_norm(h, context)
        self.attention = TrainableFlashAttention(
            h,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            dropout=config.dropout,
            parallel_context=context,
            qkv_bias=True,
            output_bias=True,
            qk_norm_eps=1e-6,
            rotary=RotaryEmbedding(config.head_dim),
        )
        self.gate_up = column_parallel(h, [f, f], context, bias=True, names=["gate", "up"])
        self.down = row_parallel(f, h, context, bias=True)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor | None = None, cu_seqlens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map `[batch, seq, hidden]` or packed `[tokens, hidden]` to the same shape."""
        x = x + self.attention(self.norm1(x), positions, cu_seqlens)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class SuiteModel(nn.Module):
    """A small decoder."""

    def __init__(self, config: SuiteConfig, context: ParallelContext) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.embed = vocab_embedding(config.vocab_size, config.hidden_size, context)
        self.blocks = nn.ModuleList(SuiteBlock(config, context) for _ in range(config.num_layers))
        self.norm = rms_norm(config.hidden_size, context)
        tied_to = self.embed if config.tied else None
        self.head = lm_head(config.hidden_size, config.vocab_size, context, tied_to=tied_to)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return local logits `[batch, seq, local vocabulary]`, or the mean loss if labels are given."""
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if labels is None:
            return logits
        return vocab_parallel_cross_entropy(logits, labels, self.context, vocab_size=self.config.vocab_size)
