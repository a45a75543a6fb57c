"""Megatron-Core's names and layouts of a GPT's weights, and Hugging Face's of the same Llama-like decoder.

Megatron fuses q, k and v group by group, `[groups, (q per group, k, v), head_dim]`, and gate and up as `[gate; up]`.
The norms before attention and MLP belong to the linear layer after them (Transformer Engine, and every `torch_dist`
checkpoint) or stand alone (local layers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from polyshard.core.errors import CheckpointError
from polyshard.core.foreign import LazyTensor, Shape

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"
QKV, GATE_UP = "self_attention.linear_qkv", "mlp.linear_fc1"

# Within a layer: Megatron's names (the first is written), Hugging Face's, the dimension that ranks share.
SINGLE = (
    ((f"{QKV}.layer_norm_weight", "input_layernorm.weight"), "input_layernorm.weight", None),
    (("self_attention.linear_proj.weight",), "self_attn.o_proj.weight", 1),
    ((f"{GATE_UP}.layer_norm_weight", "pre_mlp_layernorm.weight"), "post_attention_layernorm.weight", None),
    (("mlp.linear_fc2.weight",), "mlp.down_proj.weight", 1),
)
QK_NORMS = (
    (("self_attention.q_layernorm.weight",), "self_attn.q_norm.weight", None),
    (("self_attention.k_layernorm.weight",), "self_attn.k_norm.weight", None),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a reader finds a layer's tensor: by layer and name within it, or outside the layers by name alone."""

    of_layer: Callable[[int, str], LazyTensor | None]
    alone: Callable[[str], LazyTensor | None]


def to_hugging_face(source: Source, shape: Shape) -> dict[str, LazyTensor]:
    """Hugging Face's tensors, ordered so that a reader meets each of Megatron's in one run."""
    result = {"model.embed_tokens.weight": _rows(_need(source.alone(EMBEDDING), EMBEDDING), shape.vocabulary)}
    for leaf in ("weight", "bias") if shape.qkv_bias else ("weight",):
        for i in range(shape.layers):
            fused = _need(source.of_layer(i, f"{QKV}.{leaf}"), f"layer {i}: {QKV}.{leaf}")
            for part, name in enumerate("qkv"):
                result[f"model.layers.{i}.self_attn.{name}_proj.{leaf}"] = _of_qkv(fused, part, shape)
    for i in range(shape.layers):
        fused = _need(source.of_layer(i, f"{GATE_UP}.weight"), f"layer {i}: {GATE_UP}.weight")
        for part, name in enumerate(("gate", "up")):
            result[f"model.layers.{i}.mlp.{name}_proj.weight"] = _half(fused, part)
    for names, theirs, _ in (*SINGLE, *(QK_NORMS if shape.qk_norm else ())):
        for i in range(shape.layers):
            found = next((t for t in (source.of_layer(i, name) for name in names) if t is not None), None)
            result[f"model.layers.{i}.{theirs}"] = _need(found, f"layer {i}: {names[0]}")
    result["model.norm.weight"] = _need(source.alone(FINAL_NORM), FINAL_NORM)
    if not shape.tied:
        result["lm_head.weight"] = _rows(_need(source.alone(HEAD), HEAD), shape.vocabulary)
    return result


def from_hugging_face(tensors: Mapping[str, LazyTensor], shape: Shape, padded: int) -> dict[str, torch.Tensor]:
    """Megatron's tensors, the layers' stacked on a leading dimension, as `torch_dist` holds them.

    Args:
        tensors: Hugging Face's.
        shape: of the model.
        padded: rows of the vocabulary with padding.
    """

    def load(name: str) -> torch.Tensor:
        if name not in tensors:
            raise CheckpointError(f"{name} is missing")
        return tensors[name].load()

    def stacked(make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        return torch.stack([make(i) for i in range(shape.layers)])

    result = {EMBEDDING: _padded(load("model.embed_tokens.weight"), padded)}
    for leaf in ("weight", "bias") if shape.qkv_bias else ("weight",):
        result[f"decoder.layers.{QKV}.{leaf}"] = stacked(
            lambda i, leaf=leaf: _fused([load(f"model.layers.{i}.self_attn.{n}_proj.{leaf}") for n in "qkv"], shape)
        )
    result[f"decoder.layers.{GATE_UP}.weight"] = stacked(
        lambda i: torch.cat([load(f"model.layers.{i}.mlp.{n}_proj.weight") for n in ("gate", "up")])
    )
    for names, theirs, _ in (*SINGLE, *(QK_NORMS if shape.qk_norm else ())):
        result[f"decoder.layers.{names[0]}"] = stacked(lambda i, theirs=theirs: load(f"model.layers.{i}.{theirs}"))
    result[FINAL_NORM] = load("model.norm.weight")
    if not shape.tied:
        result[HEAD] = _padded(load("lm_head.weight"), padded)
    return result


def _need(found: LazyTensor | None, name: str) -> LazyTensor:
    if found is None:
        raise CheckpointError(f"{name} is missing: expected a Megatron GPT checkpoint of this configuration")
    return found


def _rows(whole: LazyTensor, rows: int) -> LazyTensor:
    """Without the vocabulary's padding."""
    if whole.shape[0] < rows:
        raise CheckpointError(f"the embedding has {whole.shape[0]} rows, the configuration's vocabulary {rows}")
    return LazyTensor((rows, *whole.shape[1:]), whole.dtype, lambda: whole.load()[:rows])


def _of_qkv(fused: LazyTensor, part: int, shape: Shape) -> LazyTensor:
    per_group = shape.heads // shape.kv_heads
    heads = shape.heads if part == 0 else shape.kv_heads
    expected = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if fused.shape[0] != expected:
        raise CheckpointError(f"linear_qkv has {fused.shape[0]} rows, the configuration needs {expected}")

    def load() -> torch.Tensor:
        full = fused.load()
        groups = full.view(shape.kv_heads, per_group + 2, shape.head_dim, *full.shape[1:])
        taken = groups[:, :per_group] if part == 0 else groups[:, per_group + part - 1]
        return taken.reshape(heads * shape.head_dim, *full.shape[1:])

    return LazyTensor((heads * shape.head_dim, *fused.shape[1:]), fused.dtype, load)


def _fused(qkv: list[torch.Tensor], shape: Shape) -> torch.Tensor:
    rest = qkv[0].shape[1:]
    groups = [part.view(shape.kv_heads, -1, shape.head_dim, *rest) for part in qkv]
    return torch.cat(groups, dim=1).reshape(-1, *rest)


def _half(fused: LazyTensor, part: int) -> LazyTensor:
    size = fused.shape[0] // 2
    return LazyTensor((size, *fused.shape[1:]), fused.dtype, lambda: fused.load().narrow(0, part * size, size))


def _padded(full: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((full, full.new_zeros(rows - len(full), *full.shape[1:]))) if rows > len(full) else full
