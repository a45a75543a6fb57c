"""Weights into vLLM's layers: its own work after loading, and its layerwise reload."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightSource
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

# The shard ids that vLLM's fused layers' weight loaders take, by segment.
QKV_SHARD_IDS = ("q", "k", "v")


# vLLM 0.33 asks a WeightSource for `metadata` as a cached property and for `iter_full()`; 0.32 calls both.
source_metadata: Any = cached_property if hasattr(WeightSource, "iter_full") else lambda function: function


def process_after_loading(module: Any) -> None:
    """vLLM's own work on a layer whose weights are loaded (packed CPU copies); none where the layer is not vLLM's."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        method.process_weights_after_loading(module)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that holds the weights, out of vLLM's wrapper for LoRA."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def absorb_latents(module: nn.Module) -> None:
    """An MLA layer keeps its expansion's weights in the form of its decode: make that anew; none for other layers."""
    if isinstance(module, MLAAttention):
        module.process_weights_after_loading(module.kv_b_proj.params_dtype)


def begin_reload(model: nn.Module, vllm_config: VllmConfig) -> None:
    """vLLM's layerwise reload: parameters become meta tensors that their loaders fill."""
    with set_current_vllm_config(vllm_config):
        initialize_layerwise_reload(model)


def load_into(model: Any, vllm_config: VllmConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
    """The model's own loading; gives the names of the parameters that were loaded, where the model tells."""
    with set_current_vllm_config(vllm_config):
        return model.load_weights(weights)


def end_reload(model: nn.Module, vllm_config: VllmConfig) -> None:
    """End vLLM's layerwise reload, and pack shared weights again.

    vLLM packs a weight for each layer that uses it, but reloads it for the first alone: on CPU a head that is tied to
    the embedding would go on with the old weights (0.32.0, model_executor/model_loader/reload/layerwise.py).
    """
    with set_current_vllm_config(vllm_config):
        finalize_layerwise_reload(model, vllm_config.model_config)
        users: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.numel():
                users.setdefault(weight.data_ptr(), []).append(module)
        for sharing in users.values():
            if len(sharing) > 1:
                for module in sharing:
                    process_after_loading(module)
