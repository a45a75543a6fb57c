"""A small configuration of every causal language model of the installed transformers, with its family's own pattern.

Sizes come from the family's default configuration, reduced; what a default leaves off (a layer pattern, windows,
biases) is switched on here.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from polyshard.transformers.trial.kinds import fewest_layers
from polyshard.transformers.trial.reduced import reduced_config, with_layers

_LAYERS = 8  # more than any pattern is long
_MAMBA = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
_HYBRID = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
    **{"indexer_budget": 8, "indexer_compress_ratio": 4},
}

# Fields that differ from the defaults of the configuration class.
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {**_HYBRID, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_mamba": _MAMBA,
    "granitemoehybrid": {
        **{**_HYBRID, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4, "num_experts_per_tok": 2},
        **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "shared_intermediate_size": 48},
    },
    "granitemoeshared": {"shared_intermediate_size": 1024},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "ministral": {"head_dim": 128, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
    "rwkv": {"vocab_size": 96, "hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2},
    "xlstm": {"vocab_size": 96, "hidden_size": 64, "embedding_dim": 64, "num_hidden_layers": 2, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        **{**_HYBRID, "num_hidden_layers": 9, "attention_hidden_size": 128, "attention_head_dim": 32},
        **{"num_key_value_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "n_mamba_heads": 2},
    },
    "zamba2": {
        **{**_HYBRID, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
        **{"num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 8},
    },
}

# What a family has beside its default: (model type, fields).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere, norms of heads": ("cohere", {"use_qk_norm": True}),
    "deepseek_v2, groups of experts": (
        "deepseek_v2",
        {"num_experts_per_tok": 3, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "gemma3_text, one window for all": (
        "gemma3_text",
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention"] * 2},
    ),
    "lfm2, attention only": ("lfm2", {}),
    "llama, biases and tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "phi, norms of heads": ("phi", {"qk_layernorm": True}),
    "phi3, longrope": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096},
                **{"short_factor": [1.0] * 48, "long_factor": [4.0] * 48},
            },
        },
    ),
    "phi3, window": ("phi3", {"sliding_window": 2047}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3, windows and biases": (
        "qwen3",
        {"use_sliding_window": True, "max_window_layers": 2, "attention_bias": True, "head_dim": 64},
    ),
    "stablelm, norms of heads": ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
    "starcoder2, window": ("starcoder2", {"sliding_window": 4096}),
}


def families() -> list[str]:
    """All names: the model types of the installed transformers, and the variants."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS})


def small_config(name: str) -> Any:
    """The configuration of a family or variant; at its default size if it cannot be reduced."""
    model_type, fields = VARIANTS.get(name) or (name, FIELDS.get(name, {}))
    if model_type.startswith("musicgen"):
        fields = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}}
    config = CONFIG_MAPPING[model_type](**fields)
    if "hidden_size" in fields:
        return config
    try:
        small = reduced_config(config)
        return fewest_layers(with_layers(small, min(small.num_hidden_layers, _LAYERS)))
    except Exception:  # of whatever transformers' code raises: sizes that are named in another way
        return config
