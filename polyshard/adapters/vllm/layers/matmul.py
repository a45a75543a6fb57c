"""The matrix product of an engine on CPU: polyshard's compiled one where it is faster than vLLM's, else vLLM's."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, Literal

import torch
from torch import nn

from polyshard.adapters.vllm.compat import (
    QuantizeMethodBase,
    RowParallelLinear,
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
    has_product_of_processor,
    vllm_product,
)
from polyshard.core.errors import ConfigurationError
from polyshard.layers.fused import FusedProducts
from polyshard.native.matmul import PackedProduct, unsupported_reason

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "POLYSHARD_PRODUCT"
Kind = Literal["compiled", "vllm"]


@functools.cache
def chosen(dtype: torch.dtype) -> Kind:
    """Which product weights of this dtype are multiplied by, in this process and on every machine like this one.

    vLLM's where the processor multiplies this dtype by instructions that the compiled loops do not have; else the
    compiled one. The environment variable POLYSHARD_PRODUCT forces either.

    Raises:
        ConfigurationError: the variable names neither, or the compiled product cannot be had.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if asked not in ("", "vllm", "compiled"):
        raise ConfigurationError(f"{ENVIRONMENT_VARIABLE} must be 'compiled' or 'vllm', got {asked!r}")
    if asked == "vllm" or (not asked and has_product_of_processor(dtype)):
        return "vllm"  # before anything is compiled
    reason = unsupported_reason(dtype)
    if reason is None:
        return "compiled"
    if asked:
        raise ConfigurationError(f"{ENVIRONMENT_VARIABLE}=compiled: the compiled product {reason}")
    logger.info("%s is multiplied by vLLM's product: the compiled one %s", dtype, reason)
    return "vllm"


def pack_weight(layer: Any, remove_weight: bool = False, user: Any = None, gates: bool = False) -> Any:
    """Pack `layer.weight` `[out, in]`, and give the product `(x, weight, bias) -> x Wᵀ + b` by what was packed.

    Args:
        layer: whose bias, if any, is added.
        remove_weight: free the weight, as vLLM does for its own layers.
        user: the module that a model calls, where its forward is this product: it is told what can be computed inside
            (`polyshard.add_residual`, `polyshard.swiglu`).
        gates: whether the first half of the outputs may be gates of the second.
    """
    weight = layer.weight
    if weight.is_meta or chosen(weight.dtype) == "vllm":
        if user is not None:
            user.fused_products = None
        return vllm_product(layer, remove_weight)
    product = PackedProduct(weight, gated=gates)
    if user is not None:
        user.fused_products = FusedProducts(
            out_features=product.out_features,
            added_to=lambda residual, x: product.added_to(residual, x, getattr(layer, "bias", None)),
            swiglu=(lambda x: product.swiglu(x, getattr(layer, "bias", None))) if gates else None,
        )
    layer.cpu_linear = lambda x, weight, bias=None: product(x, bias)
    if remove_weight:
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return layer.cpu_linear


def are_gates(output_sizes: list[int]) -> bool:
    """Whether the outputs of a merged layer may be gates and what they gate."""
    return len(output_sizes) == 2 and output_sizes[0] == output_sizes[1]


class PackedLinearMethod(UnquantizedLinearMethod):
    """vLLM's, with the chosen product."""

    gates = False

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack."""
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # its weight is read as it is
            super().process_weights_after_loading(layer)
        else:
            summed = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
            pack_weight(layer, remove_weight=True, user=None if summed else layer, gates=self.gates)


class PackedGateMethod(PackedLinearMethod):
    """The same for gates and what they gate."""

    gates = True


class PackedHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's for an output projection, with the chosen product."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack; the weight stays, since an embedding may share it."""
        pack_weight(layer)


class LookupMethod(UnquantizedEmbeddingMethod):
    """vLLM's for an embedding, of which no product is taken: vLLM's own packs it all the same."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing."""


def multiply_by_chosen(layer: Any, method: type[QuantizeMethodBase]) -> Any:
    """The layer, which packs by `method` where vLLM would pack its whole weight on CPU."""
    unquantized = type(layer.quant_method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    if unquantized and layer.weight.device.type == "cpu":
        layer.quant_method = method()
    return layer
