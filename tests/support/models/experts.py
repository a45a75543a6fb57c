"""Small mixtures of experts of transformers with random weights, and polyshard's models of the same configs."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from support.models.tiny import tiny_model

VOCAB = 128
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
_QWEN = {**_SHAPE, "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8}


def moe_config(kind: str, **changes) -> transformers.PretrainedConfig:
    if kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**{**_QWEN, "norm_topk_prob": True, **changes})
    elif kind == "unnormalized":  # the router of OLMoE, and a dense layer
        config = transformers.Qwen3MoeConfig(**{**_QWEN, "norm_topk_prob": False, "mlp_only_layers": [0], **changes})
    elif kind == "mixtral":
        config = transformers.MixtralConfig(**{**_SHAPE, "intermediate_size": 48, "num_local_experts": 8, **changes})
    elif kind == "gpt_oss":
        kinds = ["sliding_attention", "full_attention"]
        sizes = {"head_dim": 16, "intermediate_size": 48, "num_local_experts": 8, "sliding_window": 8}
        config = transformers.GptOssConfig(**{**_SHAPE, **sizes, "layer_types": kinds, **changes})
    else:
        config = transformers.DeepseekV3Config(
            **{
                **{**_SHAPE, "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 32},
                **{"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "q_lora_rank": 24},
                **{"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
                **{"routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
                **changes,
            }
        )
    config._experts_implementation = "eager"  # grouped_mm does not support float64
    return config


def save_moe(directory: Path, kind: str, **changes) -> Path:
    model = tiny_model(moe_config(kind, **changes))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(directory)
    return directory


def load_reference(directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    options = {"experts_implementation": "eager", "attn_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


def routers_of_transformers(directory: Path, sequence: list[int]) -> list[torch.Tensor]:
    """The set of experts of each token but the last, by layer."""
    with torch.no_grad():
        output = load_reference(directory, torch.float32)(torch.tensor([sequence[:-1]]), output_router_logits=True)
    return [logits.topk(2).indices.sort(-1).values for logits in output.router_logits]
