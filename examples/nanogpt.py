"""nanoGPT's model.py (GPT-2: learned positions, LayerNorm, GELU), ported to polyshard for training and serving.

Changes to the original: linear layers, embedding, head and attention are polyshard's; `forward` takes positions, and
`compute_logits` returns the logits. Parameters keep their names, so that nanoGPT's weights (as safetensors) load
unchanged.

    ps.register_model("NanoGPT", "nanogpt:build_model", config_type="nanogpt:GPTConfig")
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import polyshard as ps


@dataclass(frozen=True)
class GPTConfig:
    """The configuration of nanoGPT."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class MLP(nn.Module):
    """`c_proj(gelu(c_fc x))`."""

    def __init__(self, config: GPTConfig, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        self.c_fc = ps.column_parallel(config.n_embd, 4 * config.n_embd, parallel_context, bias=config.bias)
        self.c_proj = ps.row_parallel(4 * config.n_embd, config.n_embd, parallel_context, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., n_embd]`, the shape of the input."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention and MLP, each with a LayerNorm before it and a residual connection."""

    def __init__(self, config: GPTConfig, parallel_context: ps.ParallelContext, index: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = ps.TrainableFlashAttention(
            config.n_embd,
            config.n_head,
            dropout=config.dropout,
            parallel_context=parallel_context,
            qkv_bias=config.bias,
            qkv_names="c_attn",  # stored as one tensor
            output_name="c_proj",
            output_bias=config.bias,
            layer_index=index,
        )
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config, parallel_context)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Return `[..., n_embd]`, the shape of the input."""
        x = x + self.attn(self.ln_1(x), cu_seqlens=cu_seqlens)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model, with tied embedding and head."""

    def __init__(self, config: GPTConfig, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        self.config, self.parallel_context = config, parallel_context
        self.transformer = nn.ModuleDict(
            {
                "wte": ps.vocab_embedding(config.vocab_size, config.n_embd, parallel_context),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, parallel_context, i) for i in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = ps.lm_head(config.n_embd, config.vocab_size, parallel_context, tied_to=self.transformer["wte"])

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden states `[..., n_embd]` of `[batch, seq]` or packed `[tokens]`; with labels the mean loss."""
        if positions is None:
            positions = ps.sequence_positions(input_ids, cu_seqlens, self.parallel_context)
        parts = self.transformer
        x = parts["drop"](parts["wte"](input_ids) + parts["wpe"](positions))
        for block in parts["h"].children():
            x = block(x, cu_seqlens)
        hidden = parts["ln_f"](x)
        if labels is None:
            return hidden
        return ps.vocab_parallel_cross_entropy(
            self.compute_logits(hidden), labels, self.parallel_context, vocab_size=self.config.vocab_size
        )

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of the logits."""
        return self.lm_head(hidden)


def build_model(config: GPTConfig, parallel_context: ps.ParallelContext) -> GPT:
    """Build the model."""
    with parallel_context.device:  # also for torch's own modules, such as the norms
        return GPT(config, parallel_context)
