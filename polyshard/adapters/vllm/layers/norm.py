"""The RMS norm of an engine on CPU: polyshard's native kernel, or vLLM's operator."""

from __future__ import annotations

import torch

from polyshard.adapters.vllm.compat import operator_rms_norm, operator_supports_norm
from polyshard.native import norm as native


def supports_norm(x: torch.Tensor) -> bool:
    """Whether `rms_norm` supports a tensor of this size and dtype."""
    return native.supports(x) or operator_supports_norm(x)


def uses_single_operator(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a layer should call `rms_norm`; under torch.compile only if the native kernel supports the tensor."""
    supports = native.supports if torch.compiler.is_compiling() else supports_norm
    return supports(x) and x.dtype == weight.dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm of `[..., hidden]`, in the same shape, with the native kernel if it supports `x`.

    vLLM's operator rounds twice, which is visible in a bfloat16 model.
    """
    return (native.rms_norm if native.supports(x) else operator_rms_norm)(x, weight, eps)
