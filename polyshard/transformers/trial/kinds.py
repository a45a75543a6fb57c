"""Reduction of a model to the fewest layers that show every kind of layer it has."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from polyshard.transformers.replaced.observe import observe
from polyshard.transformers.trial.reduced import with_layers

_FEWEST = 2
_TRIED = 4


def fewest_layers(config: Any) -> Any:
    """Return a copy of a config with only the first layers, as few as show every kind of the model's layers.

    Args:
        config: a transformers config. It is returned unchanged if the number of layers cannot be changed.
    """
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count <= _FEWEST:
        return config
    wanted = _kinds(config)
    if wanted is None:
        return config
    first = max(wanted.index(kind) for kind in set(wanted)) + 1
    for fewer in range(max(_FEWEST, first), min(count, max(_FEWEST, first) + _TRIED)):
        small = with_layers(config, fewer)
        try:
            found = _kinds(small)
        except Exception:  # transformers' code may raise anything for a pattern that does not match
            continue
        if found is not None and _pattern(found) == _pattern(wanted[:fewer]):
            return small
    return config


def _pattern(kinds: list[str]) -> list[int]:
    """Number the kinds of layers by first occurrence, so that patterns compare equal if all layers change alike."""
    return [kinds.index(kind) for kind in kinds]


def _kinds(config: Any) -> list[str] | None:
    """Return a description of each layer, or None if the layers are not in one list."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    count = config.num_hidden_layers
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(layers) != 1:
        return None
    return [_kind(layer, config.hidden_size) for layer in layers[0]]


def _kind(layer: nn.Module, hidden_size: int) -> str:
    """Describe classes, shapes and plain settings of a layer's modules, and the arguments they pass to attention."""
    parts = []
    for name, module in layer.named_modules():
        shapes = [tuple(weight.shape) for weight in module.parameters(recurse=False)]
        settings = {
            key: value
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, float, str)) and key != "training" and "layer_id" not in key
        }
        seen = observe(module, hidden_size) if "Attention" in type(module).__name__ else None
        parts.append(f"{name} {type(module).__name__} {shapes} {settings} {seen}")
    return "; ".join(parts)


def kept_modules(model: nn.Module) -> frozenset[str]:
    """Return paths and classes of the modules that are transformers' own; numbers in paths are replaced by stars."""
    return frozenset(
        f"{re.sub(r'[0-9]+', '*', name)} ({type(module).__name__})"
        for name, module in model.named_modules()
        if type(module).__module__.startswith("transformers.") or type(module) is nn.Linear
    )
