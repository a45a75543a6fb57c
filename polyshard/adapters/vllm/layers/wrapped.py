"""Other libraries' layers in an engine on CPU: their own weights, by the engine's packed matrix product and norm.

Only for adapters that say so (`plain_products`): their column-parallel layers are a product alone, and row-parallel
ones a product, a sum over the tensor axis, and the bias.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import QuantizeMethodBase
from polyshard.adapters.vllm.layers.matmul import are_gates, pack_weight
from polyshard.adapters.vllm.layers.norm import in_one_operator, rms_norm
from polyshard.core.context import ParallelAxis
from polyshard.core.linear_adapter import adapter_with

_COLUMN = ("create_qkv_parallel", "create_lm_head")


class PackedLinearAdapter:
    """A `LinearAdapter` around another: what it makes is packed once its weights are loaded."""

    def __init__(self, inner: Any, axis: ParallelAxis) -> None:
        self._inner, self._axis = inner, axis

    def create_column_parallel(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The other's, packed; written out, since isinstance() with a protocol passes over `__getattr__`."""
        return self._create(self._inner.create_column_parallel, None, *args, **kwargs)

    def create_merged_column_parallel(
        self, input_size: int, output_sizes: list[int], *args: Any, **kwargs: Any
    ) -> nn.Module:
        """The other's, or of one that has none its column-parallel layer (`polyshard.column_parallel`), packed."""
        gates, merged = are_gates(output_sizes), getattr(self._inner, "create_merged_column_parallel", None)
        if merged is not None:
            return self._create(merged, None, input_size, output_sizes, *args, gates=gates, **kwargs)
        create = self._inner.create_column_parallel
        return self._create(create, None, input_size, sum(output_sizes), *args, gates=gates, **kwargs)

    def create_norm(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The other's, or torch's, computed by the engine's one operator where that takes it."""
        norm: Any = adapter_with(self._inner, "create_norm").create_norm(*args, **kwargs)
        if getattr(norm, "plain_norm", False):
            norm.forward = partial(_normalise, norm)  # an instance's own, on purpose
        return norm

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name in _COLUMN:
            return partial(self._create, found, None)
        return partial(self._create, found, self._axis) if name == "create_row_parallel" else found

    def _create(
        self, create: Any, summed_over: ParallelAxis | None, *args: Any, gates: bool = False, **kwargs: Any
    ) -> nn.Module:
        layer = create(*args, **kwargs)
        owners = [module for module in layer.modules() if isinstance(module._parameters.get("weight"), nn.Parameter)]
        if len(owners) == 1:
            owners[0].quant_method = PackMethod(layer, owners[0], summed_over, gates)  # pyrefly: ignore  # vLLM's convention
        return layer


def _normalise(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """`[..., hidden]` to the same shape."""
    if not in_one_operator(x, norm.weight):
        return type(norm).forward(norm, x)
    return rms_norm(x, norm.weight, norm.eps)


class PackMethod(QuantizeMethodBase):
    """How vLLM is told to do its work on a layer after each loading, a reload's too.

    It stands on the module that owns the weight: vLLM reloads no other, and a wrapper's would keep the old weights.
    """

    def __init__(self, layer: nn.Module, owner: nn.Module, summed_over: ParallelAxis | None, gates: bool) -> None:
        self._layer, self._owner, self._axis, self._gates = layer, owner, summed_over, gates
        self._alone = summed_over is None or summed_over.size == 1  # nothing is to be done after the product

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Never asked: the library made them."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never asked: the layer's forward is exchanged."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack, and multiply by what was packed from now on."""
        product = pack_weight(self._owner, user=self._layer if self._alone else None, gates=self._gates)
        self._layer.forward = partial(self._forward, product)  # pyrefly: ignore  # an instance's own, on purpose

    def _forward(self, product: Any, x: torch.Tensor) -> torch.Tensor:
        """`x` is `[..., local input]`."""
        weight, bias = self._owner.weight, getattr(self._owner, "bias", None)
        if self._alone:
            return product(x, weight, bias)
        assert self._axis is not None
        assert self._axis.collectives is not None
        y = self._axis.collectives.all_reduce(product(x, weight, None))
        return y if bias is None else y + bias
