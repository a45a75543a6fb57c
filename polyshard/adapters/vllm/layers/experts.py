"""Experts in an engine: vLLM's fused kernel on CPU, and one operator that torch.compile does not trace into."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from polyshard.adapters.vllm.compat import QuantizeMethodBase
from polyshard.adapters.vllm.compat.experts import pack_experts, unsupported_experts
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.experts import ClampedSwiglu, ExpertBank, Routing
from polyshard.experts.observed import expert_layers
from polyshard.native.custom_operator import bare_operator

logger = logging.getLogger(__name__)

_banks: WeakValueDictionary[str, ServedExperts] = WeakValueDictionary()
_numbers = itertools.count()


def serve_experts(model: nn.Module, context: ParallelContext, keep_weights: bool) -> None:
    """Make the experts of a model run as one operator, on CPU with vLLM's fused kernel if it supports them.

    Args:
        model: as its factory built it.
        context: this worker's context.
        keep_weights: keep the weights beside their packed copies.
    """
    for _, layer in expert_layers(model):
        served = ServedExperts(layer.experts, layer.bank, context.axis("tensor"), keep_weights)
        layer.experts.quant_method = served  # pyrefly: ignore  # vLLM's convention
        layer.experts.forward = served.forward  # on the instance, on purpose


class ServedExperts(QuantizeMethodBase):
    """The forward of one layer's experts, and the hook by which vLLM packs them after each load of their weights.

    Args:
        experts: the module with the parameters, built by any adapter.
        bank: its sizes.
        axis: the tensor axis.
        keep_weights: keep the weights beside their packed copies.

    Attributes:
        records: whether to keep the experts of each step.
        recorded: the experts of the last step, `[tokens, experts per token]`.
    """

    def __init__(self, experts: nn.Module, bank: ExpertBank, axis: ParallelAxis, keep_weights: bool) -> None:
        self._experts, self._bank, self._axis, self._keeps = experts, bank, axis, keep_weights
        self._own: Callable[..., torch.Tensor] = experts.forward
        self._fused: Any = None
        self.records, self.recorded = False, torch.zeros(0, 0, dtype=torch.int16)
        self._key = f"experts-{next(_numbers)}"
        _banks[self._key] = self

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Never called: the library has created them."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never called: the module's forward is replaced."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the outputs `[tokens, hidden]`, summed over the tensor axis."""
        return _served_experts(x, routing.weights, routing.experts, self._key)

    def compute(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Compute the experts, outside of what torch.compile traces."""
        if self.records:
            self.recorded = experts.to(torch.int16)  # a copy, since compiled code reuses the memory
        if self._fused is None:
            return self._own(x, Routing(weights=weights, experts=experts))
        y = self._fused(x, weights, experts)
        if self._axis.size == 1:
            return y
        assert self._axis.collectives is not None
        return self._axis.collectives.all_reduce(y)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the weights, if vLLM's kernel supports these experts."""
        held = dict(self._experts.named_parameters(recurse=False))
        reason = self._unsupported(held["gate_up"])
        self._fused = None
        if reason is not None:
            logger.info("experts are computed by %s, not by vLLM's kernel: %s", type(self._experts).__name__, reason)
            return
        transposed = self._bank.storage.is_transposed
        gate_up, down = (held[n].transpose(1, 2) if transposed else held[n] for n in ("gate_up", "down"))
        down_bias = held.get("down_bias")
        if down_bias is not None and self._axis.rank:
            down_bias = torch.zeros_like(down_bias)  # added once, though the outputs are summed over the ranks
        self._fused = pack_experts(
            gate_up,
            down,
            held.get("gate_up_bias"),
            down_bias,
            isinstance(self._bank.activation, ClampedSwiglu),
        )
        if not self._keeps:
            for name, parameter in held.items():
                setattr(self._experts, name, nn.Parameter(parameter.new_empty(0), requires_grad=False))

    def _unsupported(self, weight: torch.Tensor) -> str | None:
        bank = self._bank
        if weight.device.type != "cpu" or weight.is_meta:
            return f"it is used on CPU only: got {weight.device.type}"
        clamped = isinstance(bank.activation, ClampedSwiglu)
        if clamped and (bank.activation != ClampedSwiglu() or not bank.storage.interleaved):
            return "its clamped activation has gpt-oss's constants and interleaved weights only"
        if not clamped and bank.storage.interleaved:
            return "its SwiGLU has no interleaved weights"
        if bank.scale_input:
            return "it scales outputs only"
        return unsupported_experts(weight.dtype, bank.hidden_size)


def _compute(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, key: str) -> torch.Tensor:
    return _banks[key].compute(x, weights, experts)


def _shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


_served_experts = bare_operator(
    "served_experts(Tensor x, Tensor weights, Tensor experts, str key) -> Tensor",
    _compute,
    _shape,
    "CompositeExplicitAutograd",
)
