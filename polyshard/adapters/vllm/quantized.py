"""Quantized checkpoints on vLLM's own layers: each layer's scheme, and its codes and scales from the checkpoint.

vLLM chooses a scheme by a layer's name, which no layer knows while a factory builds it. So the linear layers are built
without memory first, and once more under their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import UnquantizedLinearMethod
from polyshard.core.errors import CheckpointError
from polyshard.core.weight_table import WeightTable


@dataclass(frozen=True, slots=True)
class Part:
    """A layer of a checkpoint, and where it goes.

    Attributes:
        layer: of the model; maybe fused from several.
        shard: what its loaders call this part; None where it is the whole.
    """

    layer: nn.Module
    shard: Any


@dataclass(frozen=True, slots=True)
class QuantizedLayers:
    """The quantized layers of a model.

    Attributes:
        parts: by their names in a checkpoint.
        weights: names, in the model, of the weights that are loaded here and not by their layouts.
    """

    parts: Mapping[str, Part]
    weights: frozenset[str]


class QuantizedLoading:
    """One pass over a checkpoint: every tensor of every quantized layer once."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._loaded: set[str] = set()

    def take(self, stored_name: str, tensor: torch.Tensor) -> list[str] | None:
        """Load a tensor; problems, or None where it belongs to no quantized layer."""
        layer_name, _, kind = stored_name.rpartition(".")
        part = self._parts.get(layer_name)
        if part is None or kind == "bias":
            return None
        parameter = part.layer._parameters.get(kind)
        if parameter is None:
            return [f"unexpected {stored_name}"]
        if stored_name in self._loaded:
            return [f"{stored_name} came twice"]
        loader: Any = parameter.weight_loader  # pyrefly: ignore  # set by vLLM's quantization methods
        loader(parameter, tensor, *(() if part.shard is None else (part.shard,)))
        self._loaded.add(stored_name)
        return []

    def missing(self) -> list[str]:
        """Names of what did not come."""
        wanted = [
            f"{name}.{kind}"
            for name, part in self._parts.items()
            for kind, parameter in part.layer._parameters.items()
            if parameter is not None  # what a scheme does not use
        ]
        return [name for name in wanted if name not in self._loaded and not name.endswith(".bias")]


def refuse_quantized_reload(name: str, quantized: QuantizedLayers | None) -> None:
    """Raise `CheckpointError` where a running model is quantized.

    vLLM's layers keep codes and scales in the form of their kernels alone, and do not take new ones: vLLM's own int8
    model answers garbage after `reload_weights`, without a word (0.32.0, CPU; `tests/test_vllm_quantized.py`).
    """
    if quantized is not None:
        raise CheckpointError(
            f"model {name!r} serves a quantized checkpoint, which vLLM cannot load into a running engine: start the "
            "engine anew"
        )


def quantize_layers(model: nn.Module, table: WeightTable, quant_config: Any) -> QuantizedLayers:
    """Build the linear layers anew, by vLLM's scheme for each.

    Args:
        model: as its factory built it, its linear layers on the meta device.
        table: its layouts.
        quant_config: vLLM's, which knows the names of fused layers.
    """
    parts: dict[str, Part] = {}
    weights: set[str] = set()
    for path, layer in model.named_modules():
        rebuild: Callable[[Any, str], None] | None = vars(layer).get("rebuild")
        if rebuild is None:
            continue
        rebuild(quant_config, f"model.{path}")
        layer.requires_grad_(False)
        if isinstance(layer.quant_method, UnquantizedLinearMethod):
            continue
        entry = table[f"{path}.weight"]
        weights.add(entry.parameter)
        names = entry.checkpoint_names
        shards = [None] if len(names) == 1 else vars(layer)["shard_ids"]
        for name, shard in zip(names, shards, strict=True):
            parts[name.removesuffix(".weight")] = Part(layer, shard)
    return QuantizedLayers(parts, frozenset(weights))
