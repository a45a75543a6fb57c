"""What layers compute with besides their weights: epsilons, scales, routers, rotary frequencies.

Two models with the same weights give other results if these differ. A layer's function describes them on the layer, by
`describe`. Rotary frequencies are read from the model, under the names that polyshard and transformers give them. What
a user's own code computes is not described.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.ranks import Ranks
from polyshard.core.weight_table import WeightTable

_ATTRIBUTE = "polyshard_computation"
_FREQUENCIES = ("inverse_frequencies", "original_inv_freq", "inv_freq")  # transformers changes the last with lengths
_FACTORS = ("factor", "attention_scaling")
_OF_LAYERS = "_original_inv_freq"  # after the type of layer
_SAMPLES = 5

Setting = bool | int | float | str | None | list[float]
Computation = dict[str, dict[str, Setting]]  # by the layer's first stored tensor


def describe(module: nn.Module, **settings: Setting) -> None:
    """Store on a layer what it computes with. Values must be equal for all sizes of all axes."""
    object.__setattr__(module, _ATTRIBUTE, {**getattr(module, _ATTRIBUTE, {}), **settings})


def computation_of(model: nn.Module, table: WeightTable) -> Computation:
    """Return the settings of the described layers and of the rotary embeddings of this rank's part of a model."""
    found: Computation = {}
    keys: dict[str, str] = {}  # by path
    alone: dict[int, str] = {}  # of rotary embeddings outside of described layers
    for path, module in model.named_modules(remove_duplicate=False):
        settings = getattr(module, _ATTRIBUTE, None)
        if settings is not None:
            keys[path] = _first_tensor(module, path, table)
            found[keys[path]] = dict(settings)
            continue
        rotary = _rotary(module)
        if rotary is None:
            continue
        owner = keys.get(path.rpartition(".")[0])
        if owner is None:
            owner = alone.setdefault(id(module), f"{type(module).__name__} {len(alone)}")
        found.setdefault(owner, {}).update(rotary)
    return found


def merged(parts: Iterable[Computation]) -> Computation:
    """Return the settings of a whole model from those of its parts, without what the parts contradict."""
    result: Computation = {}
    contradicted: set[tuple[str, str]] = set()
    for part in parts:
        for layer, settings in part.items():
            known = result.setdefault(layer, {})
            for name, value in settings.items():
                if not _same(known.setdefault(name, value), value):
                    contradicted.add((layer, name))
    for layer, name in contradicted:
        del result[layer][name]
    return result


def whole_computation(model: nn.Module, table: WeightTable, context: ParallelContext) -> Computation:
    """Return the settings of all layers of a model on every rank. A collective."""
    first = all(context.axis(name).rank == 0 for name in ("tensor", "context", "expert", "data"))
    return merged(Ranks.of(context).gather(computation_of(model, table) if first else {}))


def difference(first: Computation, second: Computation, names: tuple[str, str]) -> str | None:
    """Return the first setting with which a layer of both models computes differently, in words, or None.

    Args:
        first: the settings of a model.
        second: those of another model with the same weights. Layers that only one of the two describes are not
            compared.
        names: what the message calls them, such as "the trainer" and "engine 0".
    """
    for layer, settings in first.items():
        others = second.get(layer, {})
        for name, value in settings.items():
            if name in others and not _same(value, others[name]):
                return (
                    f"{name} of the layer of {layer!r} is {_text(value)} in {names[0]} and {_text(others[name])} in "
                    f"{names[1]}"
                )
    return None


def check_same_computation(first: Computation, second: Computation, names: tuple[str, str]) -> None:
    """Raise `ConfigurationError` if a layer of both models computes with another setting; see `difference`."""
    found = difference(first, second, names)
    if found is not None:
        raise ConfigurationError(
            f"The models compute differently with the same weights: {found}. Build both from the same config."
        )


def _first_tensor(module: nn.Module, path: str, table: WeightTable) -> str:
    for served, _ in module.named_parameters(prefix=path):
        name = served.replace(".base_layer.", ".")  # a vLLM engine with LoRA has wrapped the layer since
        if name in table:
            return table[name].checkpoint_names[0]
    return path


def _rotary(module: nn.Module) -> dict[str, Setting] | None:
    """Return the settings of a rotary embedding, which may have several, by type of layer (Gemma 3); else None."""
    kinds = [
        name.removesuffix(_OF_LAYERS) for name, _ in module.named_buffers(recurse=False) if name.endswith(_OF_LAYERS)
    ]
    found: dict[str, Setting] = {}
    for prefix in ("", *(f"{kind}_" for kind in kinds)):
        frequencies = _first(module, prefix, _FREQUENCIES)
        if not isinstance(frequencies, torch.Tensor) or frequencies.is_meta or frequencies.dim() != 1:
            continue
        factor: Any = _first(module, prefix, _FACTORS)
        last = len(frequencies) - 1
        chosen = sorted({round(last * sample / (_SAMPLES - 1)) for sample in range(_SAMPLES)})
        found[f"{prefix}rotary_dim"] = 2 * (last + 1)
        found[f"{prefix}rotary_frequencies"] = [float(value) for value in frequencies[chosen].float()]
        found[f"{prefix}rotary_factor"] = 1.0 if factor is None else float(factor)
    return found or None


def _first(module: nn.Module, prefix: str, names: Iterable[str]) -> Any:
    """Return the first of these attributes that a module has; None if it has none."""
    found = (getattr(module, f"{prefix}{name}", None) for name in names)
    return next((value for value in found if value is not None), None)


def _same(first: Any, second: Any) -> bool:
    """Whether two settings are equal; powers on other processors may differ in the last bits."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(_same(*pair) for pair in zip(first, second))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (first, second))
    return math.isclose(first, second, rel_tol=1e-5) if numbers else first == second


def _text(value: Setting) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(f'{number:g}' for number in value[:8])}{', ...' if len(value) > 8 else ''}]"
    return repr(value)
