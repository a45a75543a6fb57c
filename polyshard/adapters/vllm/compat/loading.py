"""Loading weights into vLLM's layers: processing after a load, and layerwise reload."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightSource
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

# The shard IDs that the weight loader of vLLM's QKV layer expects, by segment.
QKV_SHARD_IDS = ("q", "k", "v")


# In vLLM 0.33 `WeightSource.metadata` is a cached property and iteration uses `iter_full()`; in 0.32 it is a method.
source_metadata: Any = cached_property if hasattr(WeightSource, "iter_full") else lambda function: function


def process_after_loading(module: Any) -> None:
    """Run vLLM's processing of a layer after loading (it packs CPU copies); no-op for layers of other libraries."""
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        method.process_weights_after_loading(module)


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that holds the weights, unwrapped from vLLM's LoRA wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def absorb_latents(module: nn.Module) -> None:
    """Recompute the absorbed decode weights of an MLA layer; no-op for others."""
    if isinstance(module, MLAAttention):
        module.process_weights_after_loading(module.kv_b_proj.params_dtype)


def begin_reload(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Begin vLLM's layerwise reload, which replaces parameters by meta tensors that their loaders fill."""
    with set_current_vllm_config(vllm_config):
        initialize_layerwise_reload(model)


def load_into(model: Any, vllm_config: VllmConfig, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
    """Call the model's `load_weights`; return the names of the loaded parameters, or None if the model returns none."""
    with set_current_vllm_config(vllm_config):
        return model.load_weights(weights)


def own_kernel_tensors(places: Sequence[tuple[nn.Module, str]]) -> None:
    """Give a parameter new memory in a reload that has begun, the same in all modules that have the parameter.

    vLLM copies new values into the tensors that a layer had before, and keeps those called `bias` in place. It
    loads a tied parameter for one of its layers only, so all of them must hold one tensor.

    Args:
        places: the modules and the parameter's name in each.
    """
    own: dict[int, nn.Parameter] = {}

    def renewed(parameter: torch.Tensor) -> nn.Parameter:
        key = parameter.data_ptr()
        if key not in own:
            own[key] = _with_own_memory(parameter)
        return own[key]

    for module, name in places:
        held = get_layerwise_info(module).kernel_tensors
        if held is not None and name in held[0]:
            held[0][name] = renewed(held[0][name])
        kept = module._parameters.get(name)
        if kept is not None and not kept.is_meta:
            module.register_parameter(name, renewed(kept))


def _with_own_memory(parameter: torch.Tensor) -> nn.Parameter:
    own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    own.__dict__.update(parameter.__dict__)
    return own


def end_reload(model: nn.Module, vllm_config: VllmConfig) -> None:
    """End vLLM's layerwise reload, and pack shared weights again.

    vLLM packs a shared weight for each layer that uses it but reloads it only for the first. On CPU a head tied to the
    embedding would keep the old weights (0.32.0, model_executor/model_loader/reload/layerwise.py).
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
