"""torchtitan's Llama 3 (interleaved rotary pairs, `wq`, `w1`, `tok_embeddings`), ported to polyshard.

Changes to the original: linear layers, norms, embedding, head and attention are polyshard's, so that no plan has to
parallelize them afterwards; `forward` takes positions, and `compute_logits` returns the logits. Parameters keep their
names, so that torchtitan's weights (as safetensors) load unchanged.

    ps.register_model("Titan", "titan:build_model", config_type="titan:TransformerModelArgs")
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import polyshard as ps


@dataclass(frozen=True)
class TransformerModelArgs:
    """The configuration of torchtitan's Llama 3."""

    vocab_size: int
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 2048

    @property
    def ffn_dim(self) -> int:
        """The hidden size of the feed-forward layer."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)


class FeedForward(nn.Module):
    """`w2(silu(w1 x) * w3 x)`."""

    def __init__(self, args: TransformerModelArgs, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        f = args.ffn_dim
        self.w13 = ps.column_parallel(args.dim, [f, f], parallel_context, names=["w1", "w3"])
        self.w2 = ps.row_parallel(f, args.dim, parallel_context)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., dim]`, the shape of the input."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention and feed-forward layer, each with a norm before it and a residual connection."""

    def __init__(self, args: TransformerModelArgs, parallel_context: ps.ParallelContext, index: int) -> None:
        super().__init__()
        self.attention = ps.TrainableFlashAttention(
            args.dim,
            args.n_heads,
            args.n_kv_heads,
            parallel_context=parallel_context,
            qkv_names=("wq", "wk", "wv"),
            output_name="wo",
            interleaved=True,
            layer_index=index,
        )
        self.feed_forward = FeedForward(args, parallel_context)
        self.attention_norm = ps.rms_norm(args.dim, parallel_context, eps=args.norm_eps)
        self.ffn_norm = ps.rms_norm(args.dim, parallel_context, eps=args.norm_eps)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `[..., dim]`, the shape of the input."""
        x = x + self.attention(self.attention_norm(x), rotary=rotary, cu_seqlens=cu_seqlens)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The language model. Its layers are a dict keyed by index, as torchtitan's pipelines require."""

    def __init__(self, args: TransformerModelArgs, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        self.args, self.parallel_context = args, parallel_context
        self.tok_embeddings = ps.vocab_embedding(args.vocab_size, args.dim, parallel_context)
        self.rotary = ps.RotaryEmbedding(args.dim // args.n_heads, theta=args.rope_theta)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args, parallel_context, i) for i in range(args.n_layers)})
        self.norm = ps.rms_norm(args.dim, parallel_context, eps=args.norm_eps)
        self.output = ps.lm_head(args.dim, args.vocab_size, parallel_context)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden states `[..., dim]` of IDs `[batch, seq]` or packed `[tokens]`; with labels the mean loss."""
        h = self.tok_embeddings(tokens)
        if positions is None:
            positions = ps.sequence_positions(tokens, cu_seqlens, self.parallel_context)
        rotary = self.rotary(positions, h.dtype)
        for layer in self.layers.values():
            h = layer(h, rotary, cu_seqlens)
        hidden = self.norm(h)
        if labels is None:
            return hidden
        return ps.vocab_parallel_cross_entropy(
            self.compute_logits(hidden), labels, self.parallel_context, vocab_size=self.args.vocab_size
        )

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of the logits."""
        return self.output(hidden)


def build_model(args: TransformerModelArgs, parallel_context: ps.ParallelContext) -> Transformer:
    """Build the model."""
    return Transformer(args, parallel_context)
