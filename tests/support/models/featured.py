"""A decoder with every attention feature that a server has, one or several in each layer."""

import torch
from torch import nn
from torch.nn import functional as F

import polyshard as ps

LAYERS = (
    {"sliding_window": 6},
    {"softcap": 2.0},
    {"sinks": True},
    {"alibi": True},
    {"value_dim": 16},
    {"value_dim": 64, "scale": 0.3, "qkv_bias": True, "output_bias": True},
    {"qk_norm_eps": 1e-6, "sinks": True, "softcap": 3.0, "sliding_window": 9},
)

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


class Model(nn.Module):
    def __init__(self, config, parallel_context):
        super().__init__()
        h = config.hidden_size
        self.embed = ps.vocab_embedding(config.vocab_size, h, parallel_context)
        self.layers = nn.ModuleList(
            ps.TrainableFlashAttention(
                h,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                parallel_context=parallel_context,
                rotary=ps.RotaryEmbedding(config.head_dim, rotary_dim=config.head_dim // 2),
                layer_index=index,
                **features,
            )
            for index, features in enumerate(LAYERS)
        )
        self.norm = ps.rms_norm(h, parallel_context)
        self.head = ps.lm_head(h, config.vocab_size, parallel_context)

    def forward(self, input_ids, positions=None, *, cu_seqlens=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]), positions, cu_seqlens)
        return self.norm(x)

    def compute_logits(self, hidden):
        return self.head(hidden)


def build(config, parallel_context):
    return Model(config, parallel_context)


def initial(name, shape, generator):
    """Far from uniform attention; sinks that count."""
    if len(shape) < 2 and "sinks" not in name:
        return torch.ones(shape) if "norm" in name else torch.zeros(shape)
    return torch.randn(shape, generator=generator) * (2.0 if "sinks" in name else 0.3)
