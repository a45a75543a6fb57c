"""Llama's own checkpoints, which FairScale's layers hold: `params.json` and a `consolidated.NN.pth` for each rank.

Source: meta-llama/llama (llama/model.py) and transformers' convert_llama_weights_to_hf.py. The rotary embedding is
interleaved there and half-rotated in Hugging Face's, so the rows of wq and wk are permuted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import Foreign, LazyTensor, Options, Shape, load_pickle

# Llama's name, Hugging Face's, and the dimension that ranks share; None where each holds the whole.
_LAYER = (
    ("attention.wq.weight", "self_attn.q_proj.weight", 0),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0),
    ("attention.wo.weight", "self_attn.o_proj.weight", 1),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", 1),
    ("attention_norm.weight", "input_layernorm.weight", None),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None),
)


class LlamaFormat:
    """`consolidated.NN.pth`."""

    name = "llama"
    writes = True

    def detect(self, path: Path) -> str | None:
        """Files by name."""
        files = _files(path)
        if not files:
            return None
        return f"Llama's own format, model-parallel size {len(files)} ({files[0].name} and on)"

    def read(self, path: Path, options: Options) -> Foreign:
        """The ranks' parts joined, wq and wk permuted."""
        ranks = [load_pickle(file, options) for file in _files(path)]
        config = options.config or _config(path, ranks)
        shape = Shape.of(config)
        # Llama 1 and 2 cut the embedding along its width, Llama 3 along the vocabulary: the shapes tell.
        part = ranks[0]["tok_embeddings.weight"].shape
        embedding = 1 if part[1] * len(ranks) == shape.hidden and len(ranks) > 1 else 0
        tensors: dict[str, LazyTensor] = {}
        for name, stored, dim in _names(shape, embedding):
            if name == "output.weight" and name not in ranks[0] and shape.tied:
                continue
            parts = [_part(rank, name, path) for rank in ranks]
            turn = partial(_half_rotated, shape=shape) if name.endswith(("wq.weight", "wk.weight")) else None
            tensors[stored] = _joined(parts, dim, turn)
        known = {name for name, *_ in _names(shape, embedding)} | {"rope.freqs"}
        left = sorted(set(ranks[0]) - known)
        if left:
            raise CheckpointError(f"{path}: unexpected tensors {left[:5]}; expected Llama's names")
        return Foreign(tensors=tensors, config=config, companions=path)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """One file for each rank, as Llama 3 cuts them. The format is torch's pickle."""
        assert foreign.config is not None
        shape, size = Shape.of(foreign.config), options.tensor_parallel
        if shape.qkv_bias or shape.qk_norm:
            raise CheckpointError("Llama's format has no place for attention biases or QK norms")
        for count, what in ((shape.heads, "heads"), (shape.kv_heads, "KV heads"), (shape.vocabulary, "vocabulary")):
            if count % size:
                raise CheckpointError(f"{what} {count} cannot be divided by tensor-parallel size {size}")
        for rank in range(size):
            parts: dict[str, torch.Tensor] = {}
            for name, stored, dim in _names(shape, 0):
                if stored not in foreign.tensors and shape.tied:
                    continue
                full = foreign.tensors[stored].load()
                if name.endswith(("wq.weight", "wk.weight")):
                    full = _interleaved(full, shape)
                parts[name] = (full if dim is None else full.chunk(size, dim=dim)[rank]).contiguous().clone()
            torch.save(parts, path / f"consolidated.{rank:02d}.pth")
        (path / "params.json").write_text(json.dumps(_params(foreign.config, shape), indent=1))


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("consolidated.[0-9][0-9].pth")) if path.is_dir() else []


def _names(shape: Shape, embedding: int) -> list[tuple[str, str, int | None]]:
    names: list[tuple[str, str, int | None]] = [("tok_embeddings.weight", "model.embed_tokens.weight", embedding)]
    for i in range(shape.layers):
        names += [(f"layers.{i}.{ours}", f"model.layers.{i}.{theirs}", dim) for ours, theirs, dim in _LAYER]
    return [*names, ("norm.weight", "model.norm.weight", None), ("output.weight", "lm_head.weight", 0)]


def _part(rank: Mapping[str, torch.Tensor], name: str, path: Path) -> torch.Tensor:
    if name not in rank:
        raise CheckpointError(f"{path} lacks {name}")
    return rank[name]


def _joined(
    parts: list[torch.Tensor], dim: int | None, turn: Callable[[torch.Tensor], torch.Tensor] | None
) -> LazyTensor:
    size = list(parts[0].shape)
    if dim is not None:
        size[dim] = sum(part.shape[dim] for part in parts)

    def load() -> torch.Tensor:
        full = parts[0] if dim is None else torch.cat(parts, dim=dim)
        return full if turn is None else turn(full)

    return LazyTensor(tuple(size), parts[0].dtype, load)


def _half_rotated(full: torch.Tensor, shape: Shape) -> torch.Tensor:
    heads = full.shape[0] // shape.head_dim
    return full.view(heads, shape.head_dim // 2, 2, -1).transpose(1, 2).reshape(full.shape)


def _interleaved(full: torch.Tensor, shape: Shape) -> torch.Tensor:
    heads = full.shape[0] // shape.head_dim
    return full.view(heads, 2, shape.head_dim // 2, -1).transpose(1, 2).reshape(full.shape)


def _config(path: Path, ranks: list[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    file = path / "params.json"
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist; pass --config DIRECTORY with the model's config.json")
    params = json.loads(file.read_text())
    vocabulary = params.get("vocab_size", -1)
    if vocabulary <= 0:
        raise CheckpointError(f"{file} does not say the vocabulary's size; pass --config DIRECTORY")
    heads = params["n_heads"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params["dim"],
        "intermediate_size": ranks[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(ranks),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params["dim"] // heads,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "vocab_size": vocabulary,
        "max_position_embeddings": params.get("max_seq_len", 2048),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in ranks[0],
    }


def _params(config: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    return {
        "dim": shape.hidden,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta", 10000.0),
        "max_seq_len": config.get("max_position_embeddings", 2048),
    }
