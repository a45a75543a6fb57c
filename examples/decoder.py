"""A decoder of the Llama family in one file: Llama 2 and 3, SmolLM2, Qwen2, Qwen3, Mistral.

It has grouped-query attention, rotary embedding with the common scalings, optional QK norms, optional biases, and tied
or untied embeddings. Training and serving both call the factory `build_model` with a config and a parallel context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import polyshard as ps


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The fields of a Hugging Face config that this decoder reads."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    max_position: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    dropout: float
    sliding_windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> DecoderConfig:
        """Read an object with the attributes of a Hugging Face config; raise `ConfigurationError` if unsupported."""
        config = ps.complete_config(config)
        if config.hidden_act != "silu":
            raise ps.ConfigurationError(f"decoder.py has silu only, not hidden_act={config.hidden_act!r}")
        rope = config.rope_parameters
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ps.ConfigurationError(
                f"decoder.py rotates whole heads, not partial_rotary_factor={rope['partial_rotary_factor']}"
            )
        kind, bias = config.model_type, config.attention_bias
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm_eps=config.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=rope if rope["rope_type"] != "default" else None,
            max_position=config.max_position_embeddings,
            qkv_bias=kind == "qwen2" or bias,
            output_bias=bias,
            mlp_bias=config.mlp_bias,
            qk_norm=kind == "qwen3",
            tied=config.tie_word_embeddings,
            dropout=config.attention_dropout,
            sliding_windows=config.layer_windows,
        )


class MLP(nn.Module):
    """`residual + down(silu(gate x) * up x)`, with gate and up as one matmul."""

    def __init__(self, config: DecoderConfig, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        h, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up = ps.column_parallel(h, [f, f], parallel_context, bias=bias, names=["gate_proj", "up_proj"])
        self.down_proj = ps.row_parallel(f, h, parallel_context, bias=bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return `[..., hidden]`, the shape of both arguments."""
        return ps.add_residual(residual, ps.swiglu(x, self.gate_up), self.down_proj)


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection."""

    def __init__(self, config: DecoderConfig, parallel_context: ps.ParallelContext, index: int) -> None:
        super().__init__()
        self.input_layernorm = ps.rms_norm(config.hidden_size, parallel_context, eps=config.norm_eps)
        self.self_attn = ps.TrainableFlashAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            dropout=config.dropout,
            parallel_context=parallel_context,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            sliding_window=config.sliding_windows[index],
            layer_index=index,
        )
        self.post_attention_layernorm = ps.rms_norm(config.hidden_size, parallel_context, eps=config.norm_eps)
        self.mlp = MLP(config, parallel_context)

    def forward(self, x: torch.Tensor, **attention: Any) -> torch.Tensor:
        """Return the block's output `[..., hidden]`, the shape of the input."""
        return self.feed(self.attend(x, **attention))

    def attend(self, x: torch.Tensor, **attention: Any) -> torch.Tensor:
        """Run attention, the part of the block that mixes tokens."""
        return self.self_attn(self.input_layernorm(x), residual=x, **attention)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """Run the MLP, the part of the block that computes each token independently."""
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Transformer(nn.Module):
    """Embedding, blocks and the last norm; under pipeline parallel, this stage's part of them."""

    def __init__(self, config: DecoderConfig, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        self.stage = stage = ps.pipeline_stage(config.num_layers, parallel_context)
        if stage.first or (stage.last and config.tied):
            self.embed_tokens = ps.vocab_embedding(config.vocab_size, config.hidden_size, parallel_context)
        self.layers = ps.stage_layers(stage, lambda i: Block(config, parallel_context, i))
        if stage.last:
            self.norm = ps.rms_norm(config.hidden_size, parallel_context, eps=config.norm_eps)
        self.rotary = ps.RotaryEmbedding(
            config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            max_position=config.max_position,
        )

    @property
    def last(self) -> Block:
        """The last block."""
        *_, block = self.layers
        assert isinstance(block, Block)
        return block


class Decoder(nn.Module):
    """The language model. Its parameters have the names of a Hugging Face checkpoint."""

    def __init__(self, config: DecoderConfig, parallel_context: ps.ParallelContext) -> None:
        super().__init__()
        self.config, self.parallel_context = config, parallel_context
        self.model = Transformer(config, parallel_context)
        if self.model.stage.last:
            self.lm_head = ps.lm_head(
                config.hidden_size,
                config.vocab_size,
                parallel_context,
                tied_to=self.model.embed_tokens if config.tied else None,
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        finish: bool = True,
    ) -> torch.Tensor:
        """Return hidden states, the loss, or log-probabilities.

        Args:
            input_ids: `[batch, seq]`, or packed `[tokens]`; under context parallel this rank's part.
            positions: positions in the shape of `input_ids`; default: from 0 in each sequence.
            cu_seqlens: int32 `[sequences + 1]`, boundaries of packed input; default: one sequence.
            labels: the next token of each token, or -100, in the shape of `input_ids`; request the mean loss.
            targets: the next token of each token, in the shape of `input_ids`; request log-probabilities.
            inputs_embeds: embeddings `[..., hidden]` in place of `input_ids`; for a later pipeline stage, the output of
                the previous stage.
            finish: pass False to return the input of `finish`, so that a server runs it only for sampled tokens.

        Returns:
            Hidden states `[..., hidden]`; with `labels` the mean loss; with `targets` float32 log-probabilities in the
            shape of `targets`.
        """
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if positions is None:
            positions = ps.sequence_positions(input_ids, cu_seqlens, self.parallel_context)
        rotary = self.model.rotary(positions, x.dtype)
        *before, last = self.model.layers
        for layer in before:
            x = layer(x, rotary=rotary, cu_seqlens=cu_seqlens)
        if not finish:
            return self.model.last.attend(x, rotary=rotary, cu_seqlens=cu_seqlens)
        x = last(x, rotary=rotary, cu_seqlens=cu_seqlens)
        if not self.model.stage.last:
            return x
        hidden = self.model.norm(x)
        context, vocab_size = self.parallel_context, self.config.vocab_size
        if targets is not None:
            return ps.lm_logprobs(hidden, self.compute_logits, targets, context, vocab_size=vocab_size)
        if labels is not None:
            return ps.lm_loss(hidden, self.compute_logits, labels, context, vocab_size=vocab_size)
        return hidden

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of token IDs."""
        return self.model.embed_tokens(input_ids)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layers after the last attention; return the hidden states `[..., hidden]` of the given tokens."""
        return self.model.norm(self.model.last.feed(x))

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of the logits; `polyshard.gather_logits` returns the full logits."""
        return self.lm_head(hidden)


def build_model(config: Any, parallel_context: ps.ParallelContext) -> Decoder:
    """Build the model from a Hugging Face config (or an object with its attributes) and a parallel context."""
    return Decoder(DecoderConfig.of(config), parallel_context)
