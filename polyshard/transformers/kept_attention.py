"""Attention that keeps transformers' code at a tensor-parallel size above 1: sharded by heads, or replicated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.layers.linear import column_parallel, row_parallel
from polyshard.transformers.layers import style_of
from polyshard.transformers.replaced.attention import SummedNorm
from polyshard.transformers.replaced.observe import Observed, observe
from polyshard.transformers.replaced.recognize import NotRecognised, looks_like_attention, recognise

_USUAL = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj"), "colwise"),  # the gate multiplies the heads' outputs
    **dict.fromkeys(("o_proj", "out_proj"), "rowwise"),
}


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is the attention of a layer, with transformers' own code."""
    name = type(module).__name__
    return "Attention" in name and name != "ReplacedAttention" and isinstance(getattr(module, "layer_idx", None), int)


def kept_shards_by_heads(model: Any, size: int) -> bool:
    """Return whether all attention modules that polyshard does not replace can be sharded by heads.

    Args:
        model: a transformers model on the meta device.
        size: the tensor-parallel size.
    """
    hidden = model.config.get_text_config().hidden_size
    for path, module in model.named_modules():
        if is_attention(module) and not _replaceable(module):
            seen = observe(module, hidden)
            if seen is None or _sharded(module, seen, _styles(model, path, module), size) is None:
                return False
    return True


def shard_by_heads(model: Any, path: str, seen: Observed, context: ParallelContext) -> Observed:
    """Replace the projections of an attention module by parallel ones, and sum the gradients of its norms of heads.

    Args:
        model: a transformers model for which `kept_shards_by_heads` is true.
        path: the module's path.
        seen: the arguments that it passes to attention.
        context: the parallel context.

    Returns:
        The arguments of this rank's heads.
    """
    module: Any = model.get_submodule(path)
    size, norms = context.get_tensor_parallel_world_size(), _norms(module)
    for name, style in _styles(model, path, module).items():
        layer = getattr(module, name)
        make = row_parallel if style == "rowwise" else column_parallel
        setattr(module, name, make(layer.in_features, layer.out_features, context, bias=layer.bias is not None))
    if context.attention is None:  # a server computes no gradients
        for name in norms:
            setattr(module, name, SummedNorm(getattr(module, name), context))
    heads = seen.num_heads // size
    module.polyshard_head_offset = context.get_tensor_parallel_rank() * heads  # on which dropout depends
    return replace(seen, num_heads=heads, num_kv_heads=seen.num_kv_heads // size)


def _replaceable(module: nn.Module) -> bool:
    if not looks_like_attention(module):
        return False
    try:
        recognise(module)
    except NotRecognised:
        return False
    return True


def _styles(model: Any, path: str, module: nn.Module) -> Mapping[str, str]:
    """Return the plan's entry for each linear layer of a module, or the usual one if the plan names none of them."""
    linear = [name for name, child in module.named_children() if type(child) is nn.Linear]
    planned = {name: style_of(model.tp_plan, f"{path}.{name}") or "" for name in linear}
    return planned if any(planned.values()) else {name: _USUAL.get(name, "") for name in linear}


def _norms(module: nn.Module) -> list[str]:
    """Return the children with weights that are not linear layers."""
    others = {name: child for name, child in module.named_children() if type(child) is not nn.Linear}
    return [name for name, child in others.items() if any(True for _ in child.parameters())]


def _sharded(module: Any, seen: Observed, styles: Mapping[str, str], size: int) -> Observed | None:
    """Return the arguments that a rank's shard of the module passes to attention; None if it cannot be sharded."""
    if sorted(set(styles.values())) != ["colwise", "rowwise"] or any(True for _ in module.parameters(recurse=False)):
        return None
    if seen.num_heads % size or seen.num_kv_heads % size:
        return None
    weights = (weight for name in _norms(module) for weight in module.get_submodule(name).parameters())
    if {weight.numel() for weight in weights} - {seen.head_dim}:  # other norms see the features of all heads
        return None
    trial = copy.copy(module)
    trial._modules = dict(module._modules)
    for name, style in styles.items():
        layer = module._modules[name]
        out, inp = layer.out_features, layer.in_features
        if (inp if style == "rowwise" else out) % size:
            return None
        out, inp = (out, inp // size) if style == "rowwise" else (out // size, inp)
        with torch.device("meta"):
            trial._modules[name] = nn.Linear(inp, out, bias=layer.bias is not None, dtype=layer.weight.dtype)
    wanted = replace(seen, num_heads=seen.num_heads // size, num_kv_heads=seen.num_kv_heads // size)
    hidden = next(module._modules[name].in_features for name, style in styles.items() if style == "colwise")
    return wanted if observe(trial, hidden) == wanted else None
