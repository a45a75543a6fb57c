"""Conversion between Megatron-Core's and Hugging Face's names and layouts of a Llama-like decoder's weights.

Megatron fuses q, k and v group by group, `[groups, (q per group, k, v), head_dim]`, and gate and up as `[gate; up]`.
The norms before attention and MLP belong to the linear layer after them (Transformer Engine, and every `torch_dist`
checkpoint) or are separate (local layers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from polyshard.adapters.megatron.expert_names import SHARED, Load, expert_makers, experts_to_hugging_face, stacked
from polyshard.adapters.megatron.latent import latent_names
from polyshard.adapters.shared.hugging_face_names import same_head
from polyshard.checkpoint.quantization.detect import short
from polyshard.config.decoder_spec import DecoderSpec, expected_shapes
from polyshard.convert.accounting import account, check_shapes, without_padding
from polyshard.core.errors import CheckpointError
from polyshard.weights.lazy_tensor import LazyTensor

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
HEAD = "output_layer.weight"
LAYERS = "decoder.layers."
QKV, GATE_UP = "self_attention.linear_qkv", "mlp.linear_fc1"

Single = tuple[tuple[tuple[str, ...], str], ...]


def _single(spec: DecoderSpec) -> Single:
    """Return Megatron's names (the first is written) and Hugging Face's name of each unfused tensor in a layer."""
    if spec.latent is None:
        found = [
            ((f"{QKV}.layer_norm_weight", "input_layernorm.weight"), "input_layernorm.weight"),
            (("self_attention.linear_proj.weight",), "self_attn.o_proj.weight"),
        ]
    else:
        found = latent_names(spec.latent)
    found += [
        ((f"{GATE_UP}.layer_norm_weight", "pre_mlp_layernorm.weight"), "post_attention_layernorm.weight"),
        (("mlp.linear_fc2.weight",), "mlp.down_proj.weight"),
    ]
    if spec.output_bias:
        found.append((("self_attention.linear_proj.bias",), "self_attn.o_proj.bias"))
    if spec.mlp_bias:
        found.append((("mlp.linear_fc2.bias",), "mlp.down_proj.bias"))
    if spec.qk_norm:
        found += [((f"self_attention.{n}_layernorm.weight",), f"self_attn.{n}_norm.weight") for n in "qk"]
    return tuple(found)


def _leaves(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def to_hugging_face(
    where: Path, held: Mapping[str, LazyTensor], spec: DecoderSpec, padded: int | None
) -> dict[str, LazyTensor]:
    """Return Hugging Face's tensors, ordered so that each of Megatron's stacked tensors is read in one run.

    Args:
        where: the checkpoint, for errors.
        held: all weights of the checkpoint, with layers under `decoder.layers.LAYER.NAME`.
        spec: the decoder spec of the model.
        padded: number of rows of the padded vocabulary; None if unknown, in which case padding must be zeros.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape.
    """
    used: set[str] = set()

    def need(*names: str) -> LazyTensor:
        found = [name for name in names if name in held]
        used.update(found)
        for other in found[1:]:
            if not torch.equal(held[found[0]].load(), held[other].load()):
                raise CheckpointError(f"{where}: {found[0]} and {other} differ, expected one norm under two names.")
        if found:
            return held[found[0]]
        raise CheckpointError(
            f"{where}: {names[0]} is missing. Pass --config with the configuration that belongs to this checkpoint, or "
            "the full checkpoint."
        )

    result = {"model.embed_tokens.weight": _rows(need(EMBEDDING), "the embedding", spec.vocabulary, padded)}
    for leaf in _leaves(spec.qkv_bias) if spec.latent is None else ():
        for i in range(spec.layers):
            fused = need(f"{LAYERS}{i}.{QKV}.{leaf}")
            for part, name in enumerate("qkv"):
                result[f"model.layers.{i}.self_attn.{name}_proj.{leaf}"] = _of_qkv(fused, part, spec)
    sparse = spec.experts.sparse if spec.experts else (False,) * spec.layers
    for leaf in _leaves(spec.mlp_bias):
        for i in (i for i in range(spec.layers) if not sparse[i]):
            fused = need(f"{LAYERS}{i}.{GATE_UP}.{leaf}")
            for part, name in enumerate(("gate", "up")):
                result[f"model.layers.{i}.mlp.{name}_proj.{leaf}"] = _half(fused, part)
    for names, theirs in _single(spec):
        for i in range(spec.layers):
            if not (sparse[i] and theirs.startswith("mlp.")):
                result[f"model.layers.{i}.{theirs}"] = need(*(f"{LAYERS}{i}.{name}" for name in names))
    result |= experts_to_hugging_face(LAYERS, spec, held, need, _half)
    result["model.norm.weight"] = need(FINAL_NORM)
    if not spec.tied:
        result["lm_head.weight"] = _rows(need(HEAD), "the head", spec.vocabulary, padded)
    elif HEAD in held:
        same_head(where, need(HEAD).load(), held[EMBEDDING].load())
    account(where, held, used)
    check_shapes(where, {name: tensor.shape for name, tensor in result.items()}, expected_shapes(spec))
    return result


def padding_note(held: Mapping[str, LazyTensor], spec: DecoderSpec) -> tuple[str, ...]:
    """Return a note on the number of padding rows that were removed from the vocabulary."""
    rows = held[EMBEDDING].shape[0] - spec.vocabulary if EMBEDDING in held else 0
    return (f"left out {rows} rows of padding of the vocabulary",) if rows > 0 else ()


def from_hugging_face(tensors: Mapping[str, LazyTensor], spec: DecoderSpec, padded: int) -> dict[str, torch.Tensor]:
    """Return Megatron's tensors as `torch_dist` has them: equal layers are stacked on a leading dimension.

    Args:
        tensors: Hugging Face's tensors.
        spec: the decoder spec of the model.
        padded: number of rows of the padded vocabulary.

    Raises:
        CheckpointError: a tensor is missing, Megatron has no place for it, or the parts of one of Megatron's tensors
            have different dtypes.
    """
    account("the source", tensors, expected_shapes(spec), "Megatron's GPT has no place for them.")

    read: list[str] = []  # the parts of the current tensor

    def load(name: str) -> torch.Tensor:
        if name not in tensors:
            raise CheckpointError(f"{name} is missing")
        read.append(name)
        return tensors[name].load()

    def checked(make: Callable[[], torch.Tensor]) -> torch.Tensor:
        read.clear()
        made = make()
        dtypes = {tensors[name].dtype: name for name in read}
        if len(dtypes) > 1:  # torch would widen or round some of them
            held = " and ".join(f"{name} in {short(dtype)}" for dtype, name in dtypes.items())
            raise CheckpointError(
                f"{held} have different dtypes, but Megatron stores them in one tensor. Pass --dtype to write one "
                "dtype."
            )
        return made

    result = {EMBEDDING: _padded(load("model.embed_tokens.weight"), padded)}
    layers = [_makers(spec, layer, load) for layer in range(spec.layers)]
    if has_equal_layers(spec):
        for name in layers[0]:
            result[f"{LAYERS}{name}"] = checked(
                lambda name=name: stacked(len(layers), lambda number: layers[number][name]())
            )
    else:
        for number, layer in enumerate(layers):
            result |= {f"{LAYERS}{number}.{name}": checked(make) for name, make in layer.items()}
    result[FINAL_NORM] = load("model.norm.weight")
    if not spec.tied:
        result[HEAD] = _padded(load("lm_head.weight"), padded)
    return result


def has_equal_layers(spec: DecoderSpec) -> bool:
    """Whether all layers have the same tensors, which `torch_dist` then stacks."""
    return spec.experts is None or all(spec.experts.sparse)


def linear_layers(spec: DecoderSpec, layer: int) -> list[str]:
    """Return the linear layers of a layer without its experts, which Megatron stores one by one."""
    names = [name for names, _ in latent_names(spec.latent) for name in names] if spec.latent else [f"{QKV}.weight"]
    found = [
        name.removesuffix(".weight") for name in (*names, "self_attention.linear_proj.weight") if ".linear_" in name
    ]
    block = "mlp"
    if spec.experts is not None and spec.experts.sparse[layer]:
        block = SHARED if spec.experts.shared is not None else ""
    found += [f"{block}.linear_fc{number}" for number in (1, 2) if block]
    return list(dict.fromkeys(name for name in found if not name.endswith("layer_norm_weight")))


def _makers(spec: DecoderSpec, layer: int, load: Load) -> dict[str, Callable[[], torch.Tensor]]:
    """Return functions that make Megatron's tensors of a layer, by their names in it.

    Norms have another name on Transformer Engine's layers than on Megatron's own before experts and in latent
    attention. They are written under both; Megatron reads the one that its layers have.
    """
    place = f"model.layers.{layer}."
    experts = spec.experts
    sparse = experts is not None and experts.sparse[layer]
    found: dict[str, Callable[[], torch.Tensor]] = {}

    def joined(names: Sequence[str], leaf: str) -> list[torch.Tensor]:
        return [load(f"{place}{name}_proj.{leaf}") for name in names]

    for leaf in _leaves(spec.qkv_bias) if spec.latent is None else ():
        found[f"{QKV}.{leaf}"] = lambda leaf=leaf: _fused(joined([f"self_attn.{n}" for n in "qkv"], leaf), spec)
    for leaf in _leaves(spec.mlp_bias) if not sparse else ():
        found[f"{GATE_UP}.{leaf}"] = lambda leaf=leaf: torch.cat(joined(("mlp.gate", "mlp.up"), leaf))
    for names, theirs in _single(spec):
        if not (sparse and theirs.startswith("mlp.")):
            both = spec.latent is not None or (sparse and theirs.startswith("post_attention"))
            for name in names if both else names[:1]:
                found[name] = lambda theirs=theirs: load(place + theirs)
    return found | (expert_makers(experts, layer, load) if experts is not None and sparse else {})


def _rows(full: LazyTensor, name: str, rows: int, padded: int | None) -> LazyTensor:
    """Return the tensor without the padding rows of the vocabulary."""
    if full.shape[0] < rows:
        raise CheckpointError(
            f"{name} has the wrong shape: got {full.shape[0]} rows, expected {rows} by the configuration's vocab_size. "
            "Pass --config with the configuration that belongs to this checkpoint, or all of its ranks."
        )

    def load() -> torch.Tensor:
        values = full.load()
        return values[:rows] if full.shape[0] == padded else without_padding(name, values, rows)

    return LazyTensor((rows, *full.shape[1:]), full.dtype, load)


def _of_qkv(fused: LazyTensor, part: int, spec: DecoderSpec) -> LazyTensor:
    per_group = spec.heads // spec.kv_heads
    heads = spec.heads if part == 0 else spec.kv_heads
    expected = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    if fused.shape[0] != expected:
        raise CheckpointError(
            f"linear_qkv has the wrong shape: got {fused.shape[0]} rows, expected {expected} by the configuration. "
            "Pass --config with the configuration that belongs to this checkpoint, or all of its ranks."
        )

    def load() -> torch.Tensor:
        full = fused.load()
        groups = full.view(spec.kv_heads, per_group + 2, spec.head_dim, *full.shape[1:])
        taken = groups[:, :per_group] if part == 0 else groups[:, per_group + part - 1]
        return taken.reshape(heads * spec.head_dim, *full.shape[1:])

    return LazyTensor((heads * spec.head_dim, *fused.shape[1:]), fused.dtype, load)


def _fused(qkv: list[torch.Tensor], spec: DecoderSpec) -> torch.Tensor:
    rest = qkv[0].shape[1:]
    groups = [part.view(spec.kv_heads, -1, spec.head_dim, *rest) for part in qkv]
    return torch.cat(groups, dim=1).reshape(-1, *rest)


def _half(fused: LazyTensor, part: int) -> LazyTensor:
    size = fused.shape[0] // 2
    return LazyTensor((size, *fused.shape[1:]), fused.dtype, lambda: fused.load().narrow(0, part * size, size))


def _padded(full: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat((full, full.new_zeros(rows - len(full), *full.shape[1:]))) if rows > len(full) else full
