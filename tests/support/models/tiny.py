"""Small models of transformers with random weights: the oracle, and the checkpoints that polyshard reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

import polyshard as ps

VOCAB = 131  # odd on purpose: it divides by no tensor-parallel size


def tiny_config(kind: str, **changes) -> transformers.PretrainedConfig:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "qwen3":
        shape["head_dim"] = 16
    shape.update(changes)
    return {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
    }[kind](**shape)


def tiny_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """Random weights, biases and norms included: a weight in the wrong place has to show."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                offset = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
    return model.eval()


def save_tiny(directory: Path, kind: str, **changes) -> Path:
    tiny_model(tiny_config(kind, **changes)).save_pretrained(directory)
    return directory


def save_built(directory: Path, module: Any) -> Any:
    """The model of a module of `support` that has `build`, `CONFIG` and `initial`, initialized and saved."""
    context, config = ps.initialize("torch"), ps.ModelConfig(**module.CONFIG)
    model = module.build(config, context)
    ps.initialize_weights(model, context, initializer=module.initial)
    ps.save_checkpoint(model, directory, context, config=config)
    return model
