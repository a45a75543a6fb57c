"""vLLM's matmul, rotary embedding, norm and activation, as single operators."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from vllm import envs
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

from polyshard.native.build import has_instructions


def vllm_matmul(layer: Any, remove_weight: bool) -> Any:
    """Pack `layer.weight` for vLLM's CPU matmul, and return the matmul `(x, weight, bias) -> x Wᵀ + b`."""
    dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight)
    return layer.cpu_linear


def has_vllm_only_instructions(dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU matmul uses instructions for this dtype that the native one does not, or AMD's zentorch."""
    if current_platform.is_zen_cpu() and hasattr(torch.ops.zentorch, "zentorch_linear_unary"):
        return True
    instructions = {torch.bfloat16: ("amx_bf16",), torch.float16: ("avx512_fp16", "amx_fp16")}
    return any(has_instructions(name) for name in instructions.get(dtype, ()))


def cpu_packed_matmul(weight: torch.Tensor) -> Any:
    """Return vLLM's packed oneDNN matmul `x -> x Wᵀ`, even where an engine would choose another kernel for the size."""
    from vllm import _custom_ops as operators

    handler = operators.create_onednn_mm(weight.detach().contiguous().t(), 32)
    return partial(operators.onednn_mm, handler, bias=None)


@functools.cache
def allow_amx() -> None:
    """Request the use of AMX tiles from the operating system, if the processor has them.

    Without the request, an AMX instruction ends the process with SIGILL. vLLM's attention and experts do not request
    it: they rely on oneDNN's matmul, which does.
    """
    torch.cpu._init_amx()


def is_row_invariant(dtype: torch.dtype) -> bool:
    """Whether the bits of a row of `cpu_packed_matmul` are the same for two rows and for any larger number.

    Measured with 0.32.0 at up to 3072 input features. With AMX, in bfloat16, rows differ from 576 input features on.
    """
    if dtype == torch.bfloat16:
        return not has_instructions("amx_bf16")
    return dtype == torch.float32


def has_packed_matmul(dtype: torch.dtype) -> bool:
    """Whether `cpu_packed_matmul` supports a dtype on this processor."""
    try:
        cpu_packed_matmul(torch.zeros(32, 32, dtype=dtype))
    except RuntimeError:  # oneDNN has no primitive
        return False
    return True


ROTARY_MULTIPLE = 16  # for other rotary dimensions the CPU operator writes past the end of its tensors (0.32.0)


def supports_rotary(q: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether `rotate_in_place` supports these tensors; in exact mode trainer and engine both follow this rule."""
    return 2 * cos.shape[-1] % ROTARY_MULTIPLE == 0 and cos.dtype == q.dtype


def rotate_in_place(rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor, head_dim: int, table: torch.Tensor) -> None:
    """Apply vLLM's rotary operator in place, rotating the two halves of a head against each other (NeoX style).

    Args:
        rows: int64 `[tokens]`, the row of `table` for each token.
        q: `[tokens, heads * head_dim]`, a view of the memory to change, with a token's heads contiguous.
        k: `[tokens, kv_heads * head_dim]`.
        head_dim: size of a head.
        table: `[rows, rotary_dim]`, cosines before sines, in the dtype of `q`.
    """
    from vllm import _custom_ops as operators

    operators.rotary_embedding(rows, q, k, head_dim, table, True)


def operator_supports_norm(x: torch.Tensor) -> bool:
    """Whether `operator_rms_norm` supports this size on CPU: full vectors only."""
    return x.shape[-1] % 8 == 0


def operator_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the norm from vLLM's fused operator; vLLM's own layer uses separate torch operations on CPU."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops._C.rms_norm(out, x.contiguous(), weight, eps)
    return out


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` from one operator, `[..., 2 * size]` to `[..., size]`."""
    out = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    torch.ops._C.silu_and_mul(out, gate_up.contiguous())
    return out


def batch_invariant() -> Any:
    """Return the module of vLLM's batch-invariant CUDA operators."""
    from vllm.model_executor.determinism import batch_invariant

    return batch_invariant


def is_batch_invariant() -> bool:
    """Whether vLLM was started with VLLM_BATCH_INVARIANT=1."""
    return bool(envs.VLLM_BATCH_INVARIANT)
