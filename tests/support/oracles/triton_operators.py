"""Exact mode's operators on a GPU that has vLLM's Python files and none of its compiled ones.

`polyshard.adapters.vllm.exact.CudaOperators` multiplies and norms by the same Triton functions; its adapter imports the
engine too, which needs the compiled part. Attention here is torch's own, whose forward has one split.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch

import polyshard as ps
from polyshard.attention.rotary import rotate_heads
from polyshard.core.exact_mode import Matmul
from polyshard.exact.context import exact_mode


def batch_invariant() -> Any:
    """vLLM's module of Triton operators; the test is skipped where it cannot be imported."""
    return pytest.importorskip("vllm.model_executor.determinism.batch_invariant", reason="needs vLLM's Python files")


class TritonOperators:
    """`ExactOperators`."""

    attention_kernel = "torch_varlen"
    matmul_by_dtype = "Triton"
    attention_by_dtype = "torch_varlen"

    def __init__(self) -> None:
        self._operators = batch_invariant()

    def pack(self, weight: torch.Tensor) -> Matmul:
        return partial(self._multiply, weight.detach())

    def _multiply(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self._operators.linear_batch_invariant(x, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._operators.rms_norm_batch_invariant(x, weight, eps)

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate_heads(q, k, cos, sin)


def exact_training_context() -> ps.GroupContext:
    """A context of one process in exact mode, with these operators."""
    made: Any = ps.initialize("torch")
    return dataclasses.replace(made, exact=exact_mode(1, TritonOperators()))
