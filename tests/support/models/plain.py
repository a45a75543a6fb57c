"""A model without packed input that returns logits and has its own parameter names."""

from dataclasses import dataclass
from types import SimpleNamespace

import decoder
import torch
from torch import nn


@dataclass(frozen=True)
class OwnConfig:
    """Sizes under the names of nanoGPT; no Hugging Face counterpart."""

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    n_kv_heads: int
    block_size: int
    hidden_mlp: int
    head_dim: int
    eps: float = 1e-5


def build_own(config, parallel_context):
    assert type(config) is OwnConfig
    fields = SimpleNamespace(
        model_type="llama",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.hidden_mlp,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.eps,
        max_position_embeddings=config.block_size,
    )
    return decoder.build_model(fields, parallel_context)


class Plain(nn.Module):
    def __init__(self, config, parallel_context, *, temperature):
        super().__init__()
        self.network = decoder.build_model(config, parallel_context)
        self.temperature = temperature

    def forward(self, input_ids, position_ids):
        assert input_ids.dim() == position_ids.dim() == 2
        return self.network.compute_logits(self.network(input_ids, position_ids)) / self.temperature


class GivesTooMuch(Plain):
    def forward(self, input_ids, position_ids):
        return torch.cat([super().forward(input_ids, position_ids)] * 2, dim=1)


def under_network(name):
    return f"network.{name}"
