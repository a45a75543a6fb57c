"""How few layers of a model show every kind of layer that it has."""

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
    """Return a copy of a config with the first layers only, as few as show every kind of the model's layers.

    Args:
        config: a transformers config. It is returned as it is if the number of layers cannot be changed.
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
        except Exception:  # of whatever transformers' code raises for a pattern that does not fit
            continue
        if found is not None and _pattern(found) == _pattern(wanted[:fewer]):
            return small
    return config


def _pattern(kinds: list[str]) -> list[int]:
    """The same for layers that differ in the same places, whatever a number of layers does to all of them."""
    return [kinds.index(kind) for kind in kinds]


def _kinds(config: Any) -> list[str] | None:
    """A description of each layer; None if the layers are not in one list."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    count = config.num_hidden_layers
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(layers) != 1:
        return None
    return [_kind(layer, config.hidden_size) for layer in layers[0]]


def _kind(layer: nn.Module, hidden_size: int) -> str:
    """Classes, shapes and plain settings of a layer's modules, and what they pass to attention."""
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
    """Return places and classes of the modules that are still transformers' own; numbers in places are left out."""
    return frozenset(
        f"{re.sub(r'[0-9]+', '*', name)} ({type(module).__name__})"
        for name, module in model.named_modules()
        if type(module).__module__.startswith("transformers.") or type(module) is nn.Linear
    )
