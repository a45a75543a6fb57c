"""Small configurations of transformers' models, by how polyshard takes their attention."""

import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
HEADS = {**SIZES, "head_dim": 32}
ALONE = {**SIZES, "hidden_size": 128}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
SHARDED = {
    "llama": transformers.LlamaConfig(**HEADS),
    "llama, tied": transformers.LlamaConfig(**HEADS, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen3": transformers.Qwen3Config(**HEADS),
    "gemma2": transformers.Gemma2Config(
        **HEADS, sliding_window=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": transformers.Gemma3TextConfig(**HEADS, sliding_window=16, query_pre_attn_scalar=24),
    "phi3": transformers.Phi3Config(**ALONE),
    "granite": transformers.GraniteConfig(
        **ALONE, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "starcoder2": transformers.Starcoder2Config(**ALONE, sliding_window=None),
    "exaone4": transformers.Exaone4Config(  # rotary embedding where there is a window, and nowhere else
        **ALONE, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}
WHOLE = {  # attention of these is not recognised: it keeps its own code
    "gpt2": transformers.GPT2Config(**GPT2),
    "cohere": transformers.CohereConfig(**ALONE),
    "olmo2": transformers.Olmo2Config(**ALONE),
    "opt": transformers.OPTConfig(
        **{"vocab_size": 96, "hidden_size": 128, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"max_position_embeddings": 256, "word_embed_proj_dim": 128, "dropout": 0.0},
    ),
}
MIXTRAL = transformers.MixtralConfig(**HEADS, num_local_experts=4)  # its checkpoints rename the block
EXPERTS = {  # other tensors in checkpoints than experts one by one, and a correction bias in a router with softmax
    "granitemoe": transformers.GraniteMoeConfig(
        **ALONE, num_local_experts=4, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "ernie4_5_moe": transformers.Ernie4_5_MoeConfig(
        **ALONE, moe_num_experts=4, moe_k=2, moe_intermediate_size=64, tie_word_embeddings=False
    ),
}
LFM2 = transformers.Lfm2Config(**{**ALONE, "num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"])
ALL = {**SHARDED, **WHOLE}
