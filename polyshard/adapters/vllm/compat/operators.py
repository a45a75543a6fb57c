"""vLLM's products, rotary embedding and norm, as single operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform


def vllm_product(layer: Any, remove_weight: bool) -> Any:
    """Pack `layer.weight` for vLLM's CPU matrix product, and give that product `(x, weight, bias)`."""
    dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)
    return layer.cpu_linear


def has_product_of_processor(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU product has instructions for this dtype that the compiled one has not, or AMD's zentorch."""
    if current_platform.is_zen_cpu() and hasattr(torch.ops.zentorch, "zentorch_linear_unary"):
        return True
    able = torch.cpu.get_capabilities()
    wanted = {torch.bfloat16: ("amx_bf16",), torch.float16: ("avx512_fp16", "amx_fp16")}
    return any(able.get(name, False) for name in wanted.get(dtype, ()))


def cpu_packed_product(weight: torch.Tensor) -> Any:
    """vLLM's packed CPU matrix product `x -> x Wᵀ` of oneDNN, whatever kernel an engine would choose for the size."""
    from vllm import _custom_ops as operators

    handler = operators.create_onednn_mm(weight.detach().contiguous().t(), 32)
    return partial(operators.onednn_mm, handler, bias=None)


def has_packed_product(dtype: torch.dtype) -> bool:
    """Whether `cpu_packed_product` takes a dtype on this processor."""
    try:
        cpu_packed_product(torch.zeros(32, 32, dtype=dtype))
    except RuntimeError:  # oneDNN has no primitive
        return False
    return True


ROTARY_MULTIPLE = 16  # rotary dims of whole vectors; at others the operator writes past the end on CPU (0.32.0)


def takes_rotary(q: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether the operator below takes heads and cosines like these: one rule for trainer and engine in exact mode."""
    return 2 * cos.shape[-1] % ROTARY_MULTIPLE == 0 and cos.dtype == q.dtype


def rotate_in_place(rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor, head_dim: int, table: torch.Tensor) -> None:
    """vLLM's rotary operator, halves turned against each other (neox style).

    Args:
        rows: int64 `[tokens]`, into `table`.
        q: `[tokens, heads * head_dim]`, a view of the memory to be changed; a token's heads lie together.
        k: `[tokens, kv_heads * head_dim]`.
        head_dim: size of a head.
        table: `[rows, rotary_dim]`, cosines before sines, in the dtype of `q`.
    """
    from vllm import _custom_ops as operators

    operators.rotary_embedding(rows, q, k, head_dim, table, True)


def operator_takes_norm(x: torch.Tensor) -> bool:
    """Whether the operator below takes this size on CPU: whole vectors."""
    return x.shape[-1] % 8 == 0


def operator_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """vLLM's norm in one operator; its own layer runs one torch operation after another on CPU."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops._C.rms_norm(out, x.contiguous(), weight, eps)
    return out


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` in one operator, `[..., 2 size]` to `[..., size]`."""
    out = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    torch.ops._C.silu_and_mul(out, gate_up.contiguous())
    return out


def batch_invariant() -> Any:
    """vLLM's batch-invariant CUDA operators."""
    from vllm.model_executor.determinism import batch_invariant

    return batch_invariant


def is_batch_invariant() -> bool:
    """Whether vLLM was started with VLLM_BATCH_INVARIANT=1."""
    return bool(envs.VLLM_BATCH_INVARIANT)
