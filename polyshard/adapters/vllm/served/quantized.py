"""Quantized checkpoints on vLLM's layers: the scheme of each layer, and the loading of its codes and scales.

vLLM chooses a scheme by layer name, but a layer does not know its name while a factory builds it. Linear layers are
therefore first built without memory, and then rebuilt under their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import UnquantizedLinearMethod, VllmConfig
from polyshard.checkpoint.files import TensorReader
from polyshard.checkpoint.quantization.dequantize import ACTIVATION_SCALES
from polyshard.checkpoint.quantization.detect import CONVERT, FLOATS, short
from polyshard.checkpoint.quantization.reading import refuse_quantized
from polyshard.core.errors import CheckpointError, RegistrationError
from polyshard.core.weight_table import IGNORED_TENSORS, WeightTable


@dataclass(frozen=True, slots=True)
class Part:
    """The destination of one layer of a checkpoint.

    Attributes:
        layer: the layer of the model, which may be fused from several layers of the checkpoint.
        shard: the name that the weight loader gives this part; None if the layer is not fused.
    """

    layer: nn.Module
    shard: Any


@dataclass(frozen=True, slots=True)
class QuantizedLayers:
    """The quantized layers of a model.

    Attributes:
        parts: the destinations by layer name in a checkpoint.
        weights: names in the model of the weights that are loaded here and not by their layouts.
    """

    parts: Mapping[str, Part]
    weights: frozenset[str]


class QuantizedLoading:
    """One pass over a checkpoint, which loads each tensor of each quantized layer once."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._loaded: set[str] = set()

    def load(self, stored_name: str, tensor: torch.Tensor) -> list[str] | None:
        """Load a tensor; return the problems found, or None if the tensor belongs to no quantized layer."""
        layer_name, _, kind = stored_name.rpartition(".")
        part = self._parts.get(layer_name)
        if part is None:
            return None
        if kind == "bias":  # AutoGPTQ writes a bias of zeros for layers that have none; vLLM's own models skip any
            return [] if part.layer._parameters.get("bias") is None and not tensor.any() else None
        parameter = part.layer._parameters.get(kind)
        if parameter is None:
            return [] if kind == "g_idx" and _in_order(tensor) else [f"unexpected {stored_name}"]
        if stored_name in self._loaded:
            return [f"duplicate {stored_name}"]
        if tensor.dtype != parameter.dtype and not {tensor.dtype, parameter.dtype} <= set(FLOATS):
            return [f"{stored_name} has the wrong dtype: got {short(tensor.dtype)}, expected {short(parameter.dtype)}"]
        loader: Any = parameter.weight_loader  # pyrefly: ignore  # set by vLLM's quantization methods
        self._loaded.add(stored_name)
        try:
            loader(parameter, tensor, *(() if part.shard is None else (part.shard,)))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:  # of vLLM's own loaders
            reason = " ".join(str(error).split()) or type(error).__name__
            return [f"{stored_name} is {list(tensor.shape)}, which this scheme does not take ({reason})"]
        return []

    def missing(self) -> list[str]:
        """Return the names of the tensors that have not been loaded."""
        expected = [
            f"{name}.{kind}"
            for name, part in self._parts.items()
            for kind, parameter in part.layer._parameters.items()
            if parameter is not None  # None: unused by the scheme
        ]
        return [name for name in expected if name not in self._loaded and not name.endswith(".bias")]


def _in_order(groups: torch.Tensor) -> bool:
    """Whether GPTQ's groups are consecutive runs of equal length, as a scheme without `g_idx` assumes."""
    length = int((groups == 0).sum())
    return length > 0 and torch.equal(groups.long(), torch.arange(len(groups)) // length)


def _layer(stored_name: str) -> str:
    return stored_name.rpartition(".")[0]


def _is_taken(stored_name: str, parts: Mapping[str, Part]) -> bool:
    """Whether a quantized layer has a parameter for a tensor; GPTQ's `g_idx` is looked at when it comes."""
    part, kind = parts.get(_layer(stored_name)), stored_name.rpartition(".")[2]
    return part is not None and (kind == "g_idx" or part.layer._parameters.get(kind) is not None)


def refuse_unserved_codes(
    name: str,
    vllm_config: VllmConfig,
    table: WeightTable,
    rename: Callable[[str], str],
    elsewhere: frozenset[str],
    quantized: QuantizedLayers | None,
) -> None:
    """Raise before weights are loaded if a directory holds codes or scales that no layer of the model takes.

    Args:
        name: the architecture, for messages.
        vllm_config: vLLM's.
        table: the model's layouts.
        rename: from a stored name to that of the model's layers.
        elsewhere: names of the weights that other pipeline stages hold.
        quantized: layers that load codes and scales in place of weights.

    Raises:
        CheckpointError: the configuration does not speak of them, so vLLM would cast them to weights; or they belong to
            a layer that is not quantized, such as gpt-oss's experts in MXFP4, which are no linear layers.
    """
    directory = Path(vllm_config.model_config.model)
    if vllm_config.load_config.load_format not in ("auto", "safetensors"):
        return
    if not directory.is_dir() or next(directory.glob("*.safetensors"), None) is None:
        return  # from the Hub, or pickles: each tensor is checked when it is loaded
    reader = TensorReader(directory)
    known = {other for entry in table.values() for other in (*entry.checkpoint_names, *entry.tied_names)} | elsewhere
    own = {stored for stored in reader.where if rename(stored) in known}
    taken: set[str] = set()
    if quantized is not None:
        others = {stored.removesuffix(".weight") for stored in elsewhere}
        taken = {
            stored
            for stored in reader.where
            if _is_taken(rename(stored), quantized.parts) or _layer(rename(stored)) in others
        }
        scales = [stored for stored in reader.where if stored.endswith(ACTIVATION_SCALES) and stored not in own | taken]
        if scales:
            raise CheckpointError(
                f"model {name!r} cannot be served: {directory} holds scales of activations or of the KV cache that no "
                f"quantized linear layer takes: got {', '.join(scales[:3])}, {len(scales)} in all, expected none. "
                f"{CONVERT}"
            )
    try:
        refuse_quantized(directory, reader, own, IGNORED_TENSORS, taken)
    except CheckpointError as error:
        raise CheckpointError(f"model {name!r} cannot be served: {error}") from None


def refuse_quantized_reload(name: str, quantized: QuantizedLayers | None) -> None:
    """Raise `CheckpointError` if a running model is quantized.

    vLLM's layers keep codes and scales only in the layout of their kernels, and cannot load new ones. vLLM's own int8
    model silently answers garbage after `reload_weights` (0.32.0, CPU; `tests/serving/test_vllm_quantized.py`).
    """
    if quantized is not None:
        raise CheckpointError(
            f"model {name!r} serves a quantized checkpoint, which vLLM cannot reload into a running engine. Restart "
            "the engine"
        )


def _unsupported(path: str, quant_config: Any, error: Exception) -> str:
    method, reason = quant_config.get_name(), " ".join(str(error).split()) or type(error).__name__
    return (
        f"quantization {method} of {path} is unsupported by vLLM on this device: got {reason}. Write floating-point "
        "weights with `polyshard convert --dtype bfloat16` (FP8, MXFP4, compressed-tensors' int8 and float8), or serve "
        "a checkpoint with another quantization"
    )


def quantize_layers(model: nn.Module, table: WeightTable, quant_config: Any) -> QuantizedLayers:
    """Rebuild the linear layers, each with vLLM's quantization scheme for it.

    Args:
        model: the model that the factory built, with its linear layers on the meta device.
        table: its weight layouts.
        quant_config: vLLM's quantization config, which knows the names of fused layers.

    Raises:
        RegistrationError: vLLM has no kernel for a layer's scheme on this device.
    """
    parts: dict[str, Part] = {}
    weights: set[str] = set()
    for path, layer in model.named_modules():
        rebuild: Callable[[Any, str], None] | None = vars(layer).get("rebuild")
        if rebuild is None:
            continue
        try:
            rebuild(quant_config, f"model.{path}")
        except (ValueError, NotImplementedError, AssertionError, RuntimeError) as error:
            raise RegistrationError(_unsupported(path, quant_config, error)) from error
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
