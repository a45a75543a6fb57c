"""The matmul of an engine on CPU: polyshard's native one if it is faster than vLLM's, else vLLM's."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import torch
from torch import nn

from polyshard.adapters.vllm.compat import (
    QuantizeMethodBase,
    RowParallelLinear,
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
    has_vllm_only_instructions,
    vllm_matmul,
)
from polyshard.core.environment import MATMUL
from polyshard.core.errors import ConfigurationError
from polyshard.layers.fused import FusedProducts
from polyshard.native.matmul import PackedProduct, unsupported_reason

logger = logging.getLogger(__name__)

Kind = Literal["native", "vllm"]


@functools.cache
def select_matmul(dtype: torch.dtype) -> Kind:
    """Select the matmul for weights of this dtype; the choice is the same on equal machines.

    It is vLLM's if the processor has instructions for this dtype that the native kernels do not use; else the native
    one. The environment variable POLYSHARD_MATMUL forces either.

    Raises:
        ConfigurationError: the variable has another value, or the native matmul is unavailable.
    """
    forced = MATMUL.read()
    if forced not in (None, "vllm", "native"):
        raise ConfigurationError(f"{MATMUL.name} must be 'native' or 'vllm', got {forced!r}")
    if forced == "vllm" or (not forced and has_vllm_only_instructions(dtype)):
        return "vllm"  # before the native kernel is built
    reason = unsupported_reason(dtype)
    if reason is None:
        return "native"
    if forced:
        raise ConfigurationError(f"{MATMUL.name}=native is unsupported: the native matmul {reason}")
    logger.info("using vLLM's matmul for %s: the native one %s", dtype, reason)
    return "vllm"


def pack_weight(layer: Any, remove_weight: bool = False, user: Any = None, gate_up: bool = False) -> Any:
    """Pack `layer.weight` `[out, in]`, and return the matmul `(x, weight, bias) -> x Wᵀ + b` over the packed weight.

    Args:
        layer: the module with the weight and, optionally, a bias.
        remove_weight: free the weight, as vLLM does for its own layers.
        user: the module that a model calls, if its forward is only this matmul. Its `fused_products` is set for
            `polyshard.add_residual` and `polyshard.swiglu`.
        gate_up: whether the layer may be a merged gate/up projection.
    """
    weight = layer.weight
    if weight.is_meta or select_matmul(weight.dtype) == "vllm":
        if user is not None:
            user.fused_products = None
        return vllm_matmul(layer, remove_weight)
    matmul = PackedProduct(weight, gated=gate_up)
    if user is not None:
        user.fused_products = FusedProducts(
            out_features=matmul.out_features,
            added_to=lambda residual, x: matmul.added_to(residual, x, getattr(layer, "bias", None)),
            swiglu=(lambda x: matmul.swiglu(x, getattr(layer, "bias", None))) if gate_up else None,
        )
    layer.cpu_linear = lambda x, weight, bias=None: matmul(x, bias)
    if remove_weight:
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return layer.cpu_linear


def is_gate_up(output_sizes: list[int]) -> bool:
    """Whether a merged layer with these output sizes may be a gate/up projection."""
    return len(output_sizes) == 2 and output_sizes[0] == output_sizes[1]


class PackedLinearMethod(UnquantizedLinearMethod):
    """vLLM's method for linear layers, with the selected matmul."""

    gate_up = False

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the layer's weight."""
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # its weight is read directly
            super().process_weights_after_loading(layer)
        else:
            reduced = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
            pack_weight(layer, remove_weight=True, user=None if reduced else layer, gate_up=self.gate_up)


class PackedGateUpMethod(PackedLinearMethod):
    """`PackedLinearMethod` of a merged gate/up projection."""

    gate_up = True


class PackedHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's method for an output projection, with the selected matmul."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weight, and keep the original, which an embedding may share."""
        pack_weight(layer)


class LookupMethod(UnquantizedEmbeddingMethod):
    """vLLM's method for an embedding, without the packing: an embedding needs no matmul."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing."""


def use_selected_matmul(layer: Any, method: type[QuantizeMethodBase]) -> Any:
    """Make a layer pack with `method` if it is unquantized and on CPU; return the layer."""
    unquantized = type(layer.quant_method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    if unquantized and layer.weight.device.type == "cpu":
        layer.quant_method = method()
    return layer
