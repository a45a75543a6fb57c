"""Other libraries' layers in an engine on CPU: their weights, with the engine's packed matmul and norm.

Only adapters with `plain_products` are wrapped. Their column-parallel layers are only a matmul, and their row-parallel
layers a matmul, a sum over the tensor axis, and the bias.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm.compat import QuantizeMethodBase
from polyshard.adapters.vllm.layers.matmul import is_gate_up, pack_weight
from polyshard.adapters.vllm.layers.norm import rms_norm, uses_single_operator
from polyshard.core.context import ParallelAxis
from polyshard.core.linear_adapter import adapter_with

_COLUMN = ("create_qkv_parallel", "create_lm_head")


class PackedLinearAdapter:
    """A `LinearAdapter` around another, whose layers are packed once their weights are loaded."""

    def __init__(self, inner: Any, axis: ParallelAxis) -> None:
        self._inner, self._axis = inner, axis

    def create_column_parallel(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the inner adapter's layer, packed after loading.

        This method is explicit because `isinstance` with a protocol ignores `__getattr__`.
        """
        return self._create(self._inner.create_column_parallel, None, *args, **kwargs)

    def create_merged_column_parallel(
        self, input_size: int, output_sizes: list[int], *args: Any, **kwargs: Any
    ) -> nn.Module:
        """Return the inner adapter's merged layer, or a column-parallel layer if it has none, packed after loading."""
        gate_up, merged = is_gate_up(output_sizes), getattr(self._inner, "create_merged_column_parallel", None)
        if merged is not None:
            return self._create(merged, None, input_size, output_sizes, *args, gate_up=gate_up, **kwargs)
        create = self._inner.create_column_parallel
        return self._create(create, None, input_size, sum(output_sizes), *args, gate_up=gate_up, **kwargs)

    def create_norm(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the inner adapter's or torch's norm, computed with the engine's single operator if it is supported."""
        norm: Any = adapter_with(self._inner, "create_norm").create_norm(*args, **kwargs)
        if getattr(norm, "plain_norm", False):
            norm.forward = partial(_normalise, norm)  # on the instance, on purpose
        return norm

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name in _COLUMN:
            return partial(self._create, method, None)
        return partial(self._create, method, self._axis) if name == "create_row_parallel" else method

    def _create(
        self, create: Any, reduce_axis: ParallelAxis | None, *args: Any, gate_up: bool = False, **kwargs: Any
    ) -> nn.Module:
        layer = create(*args, **kwargs)
        owners = [module for module in layer.modules() if isinstance(module._parameters.get("weight"), nn.Parameter)]
        if len(owners) == 1:
            method = PackMethod(layer, owners[0], reduce_axis, gate_up)
            owners[0].quant_method = method  # pyrefly: ignore  # vLLM's convention
        return layer


def _normalise(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the norm of `[..., hidden]`, in the same shape."""
    if not uses_single_operator(x, norm.weight):
        return type(norm).forward(norm, x)
    return rms_norm(x, norm.weight, norm.eps)


class PackMethod(QuantizeMethodBase):
    """The hook by which vLLM packs a layer after each load or reload of its weights.

    It is set on the module that owns the weight, the only one that vLLM reloads. On a wrapper it would keep the old
    weights.
    """

    def __init__(self, layer: nn.Module, owner: nn.Module, reduce_axis: ParallelAxis | None, gate_up: bool) -> None:
        self._layer, self._owner, self._axis, self._gate_up = layer, owner, reduce_axis, gate_up
        self._only_matmul = reduce_axis is None or reduce_axis.size == 1

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Never called: the library has created them."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never called: the layer's forward is replaced."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weight, and replace the layer's forward by one that uses it."""
        matmul = pack_weight(self._owner, user=self._layer if self._only_matmul else None, gate_up=self._gate_up)
        self._layer.forward = partial(self._forward, matmul)  # pyrefly: ignore  # on the instance, on purpose

    def _forward(self, matmul: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for `x` `[..., local input]`."""
        weight, bias = self._owner.weight, getattr(self._owner, "bias", None)
        if self._only_matmul:
            return matmul(x, weight, bias)
        assert self._axis is not None
        assert self._axis.collectives is not None
        y = self._axis.collectives.all_reduce(matmul(x, weight, None))
        return y if bias is None else y + bias
