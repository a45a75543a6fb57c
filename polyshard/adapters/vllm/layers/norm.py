"""The norm of an engine on CPU: polyshard's compiled one, or vLLM's operator."""

from __future__ import annotations

import torch

from polyshard.adapters.vllm.compat import operator_rms_norm, operator_takes_norm
from polyshard.native import norm as compiled


def takes_norm(x: torch.Tensor) -> bool:
    """Whether `rms_norm` computes a tensor like this one."""
    return compiled.supports(x) or operator_takes_norm(x)


def in_one_operator(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a layer's norm goes by `rms_norm` now; a compiled graph has its own for what the loops do not take."""
    takes = compiled.supports if torch.compiler.is_compiling() else takes_norm
    return takes(x) and x.dtype == weight.dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`[..., hidden]` to the same shape. vLLM's operator rounds twice, and in bfloat16 that is seen in a model."""
    return (compiled.rms_norm if compiled.supports(x) else operator_rms_norm)(x, weight, eps)
