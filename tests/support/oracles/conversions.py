"""Checkpoints of small models for conversions: written by the formats' own libraries, judged by transformers' "
"logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from polyshard.convert.format import Options

IDS = torch.arange(200)[None] * 7 % 128
ALLOW = Options(allow_pickle=True)
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits(directory: Path) -> torch.Tensor:
    """Logits of a Hugging Face directory in transformers, which must find every tensor in it."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(IDS % model.config.vocab_size).logits


def with_config(config: transformers.PretrainedConfig | dict[str, Any]) -> Options:
    """Options of a format that holds no configuration."""
    return Options(config=config if isinstance(config, dict) else config.to_dict(), allow_pickle=True)


def save_module(directory: Path, state: dict[str, Any], **content: Any) -> Path:
    """A DeepSpeed checkpoint without ZeRO, as `engine.save_checkpoint` lays it out."""
    (directory / "step").mkdir(parents=True)
    (directory / "latest").write_text("step")
    torch.save({"module": state, **content}, directory / "step" / "mp_rank_00_model_states.pt")
    return directory


def meta_params(directory: Path, **changes: Any) -> None:
    """Change fields of `params.json`; None takes one out."""
    file = directory / "params.json"
    params = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in params.items() if value is not None}))


def save_gguf(
    file: Path,
    model: transformers.PreTrainedModel,
    architecture: str,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A model in float32 as llama.cpp's convert_hf_to_gguf.py writes it, by gguf's own writer and table of names."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for key, value in (metadata or {}).items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(key, value)
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, value in state.items():
        leaf = ".bias" if name.endswith(".bias") else ".weight"
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.reshape(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        found = names.get_name(name.removesuffix(leaf))
        assert found is not None
        writer.add_tensor(found + leaf, value.numpy().astype(np.float32))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
