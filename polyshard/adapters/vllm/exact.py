"""The operators of exact mode: those of vLLM whose output bits for a row do not depend on the rest of the batch.

The measurements behind each choice are in docs/explanation/exactness.md.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.attention.exact import attention_kernel_name
from polyshard.adapters.vllm.layers.matmul import select_matmul
from polyshard.adapters.vllm.layers.norm import rms_norm, supports_norm
from polyshard.attention.rotary import rotate_heads
from polyshard.core.context import GroupContext
from polyshard.core.environment import MATMUL
from polyshard.core.errors import ConfigurationError, LayoutError, RegistrationError
from polyshard.core.exact_mode import ExactOperators, Matmul
from polyshard.core.serving import RegisteredModel
from polyshard.exact.context import check_shards, exact_mode
from polyshard.native.matmul import PackedProduct, unsupported_reason

_UNSUPPORTED_DTYPE = "exact mode does not support {} on this CPU (supported: {}). Use a supported dtype on both sides"


class CpuOperators:
    """`ExactOperators` on CPU."""

    attention_kernel = "vllm_exact"

    @property
    def matmul_by_dtype(self) -> str:
        """The matmul of each dtype, `native` or `vllm`, as text."""
        return _by_dtype(exact_matmuls())

    @property
    def attention_by_dtype(self) -> str:
        """The attention kernel of each dtype, `native` or `vllm`, as text."""
        return _by_dtype({dtype: attention_kernel_name(dtype) for dtype in exact_matmuls()})

    def pack(self, weight: torch.Tensor) -> Matmul:
        """Return the native matmul, or oneDNN's where that is unavailable.

        A single row is duplicated for oneDNN, which uses a different kernel for one row.

        Raises:
            ConfigurationError: exact mode does not support the dtype on this CPU.
        """
        if weight.dtype not in exact_matmuls():
            raise ConfigurationError(unsupported_dtype_reason(weight.dtype))
        if exact_matmuls()[weight.dtype] == "native":
            return PackedProduct(weight)
        return partial(_duplicate_single_row, compat.cpu_packed_matmul(weight))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the norm from the engine's operator, or from torch operations if it does not support the size."""
        return (rms_norm if supports_norm(x) else torch_rms_norm)(x, weight, eps)

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate copies with vLLM's operator, or with torch operations if it does not support the size."""
        if not compat.supports_rotary(q, cos):
            return rotate_heads(q, k, cos, sin)
        table = torch.cat((cos, sin), dim=-1).expand(*q.shape[:-2], 1, -1).flatten(0, -2)
        rows = torch.arange(len(table))
        q, k = (t.clone(memory_format=torch.contiguous_format) for t in (q, k))
        flat_q, flat_k = (t.view(len(table), -1) for t in (q, k))
        compat.rotate_in_place(rows, flat_q, flat_k, q.shape[-1], table)
        return q, k


@functools.cache
def exact_matmuls() -> dict[torch.dtype, str]:
    """Return the matmul, `native` or `vllm`, of each dtype that exact mode supports on this CPU.

    It is the native one wherever it can be built, also where vLLM's is faster (AMX). vLLM's is used for dtypes in which
    a row's bits do not depend on the number of rows: bfloat16 with AMX is none of them.

    Raises:
        ConfigurationError: POLYSHARD_MATMUL has an unknown value, or names a matmul that is unavailable.
    """
    matmuls = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if MATMUL.read() != "vllm" and unsupported_reason(dtype) is None:
            matmuls[dtype] = "native"
        elif select_matmul(dtype) == "vllm" and compat.is_row_invariant(dtype) and compat.has_packed_matmul(dtype):
            matmuls[dtype] = "vllm"
    return matmuls


def _by_dtype(kinds: dict[torch.dtype, str]) -> str:
    return ", ".join(f"{kind} {str(dtype).removeprefix('torch.')}" for dtype, kind in kinds.items())


def unsupported_dtype_reason(dtype: torch.dtype) -> str:
    """Return the message that rejects a dtype."""
    return _UNSUPPORTED_DTYPE.format(dtype, ", ".join(map(str, exact_matmuls())))


class CudaOperators:
    """`ExactOperators` on CUDA: vLLM's batch-invariant Triton operators. Unverified (docs/how-to/gpu.md)."""

    attention_kernel = "vllm_exact"
    matmul_by_dtype = "Triton"
    attention_by_dtype = "flash-attention"

    def pack(self, weight: torch.Tensor) -> Matmul:
        """Return vLLM's persistent matmul, whose tiles do not depend on the number of rows."""
        return partial(_invariant_matmul, weight.detach())

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return vLLM's batch-invariant norm."""
        return compat.batch_invariant().rms_norm_batch_invariant(x, weight, eps)

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate with torch's elementwise operations, which sum nothing and so have no summation order."""
        return rotate_heads(q, k, cos, sin)


def operators_of(device: torch.device) -> ExactOperators:
    """Return the exact operators of a device.

    Raises:
        ConfigurationError: exact mode does not support the device.
    """
    if device.type == "cpu":
        return CpuOperators()
    if device.type == "cuda":
        return CudaOperators()
    raise ConfigurationError(f"exact mode does not support the device: got {device.type}, expected cpu or cuda")


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMS norm, computed with torch operations."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def exact_serving(context: GroupContext, registered: RegisteredModel, vllm_config: compat.VllmConfig) -> GroupContext:
    """Return the context of a worker that serves in exact mode.

    Raises:
        RegistrationError: the engine's settings change the bits.
    """
    device, cache_dtype = context.device, vllm_config.cache_config.cache_dtype
    why = None
    if not compat.is_eager(vllm_config):
        why = "the compiler fuses and reorders operations. Start the engine with enforce_eager=True"
    elif vllm_config.quant_config is not None or vllm_config.lora_config is not None:
        why = "quantized weights and LoRA use other kernels. Serve an unquantized checkpoint without LoRA"
    elif cache_dtype not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        why = f"a KV cache of {cache_dtype} rounds keys and values, unlike training. Remove kv_cache_dtype"
    elif device.type == "cpu" and compat.model_dtype(vllm_config) not in exact_matmuls():
        why = unsupported_dtype_reason(compat.model_dtype(vllm_config))
    elif device.type == "cuda" and not compat.is_batch_invariant():
        why = "on CUDA it needs batch-invariant kernels. Set VLLM_BATCH_INVARIANT=1"
    if why is not None:
        raise RegistrationError(f"model {registered.name!r} was registered with exact=True: {why}")
    try:
        shards = check_shards(registered.exact_shards, context.layout.tensor)
    except LayoutError as error:
        raise RegistrationError(f"model {registered.name!r}: {error}") from None
    mode = exact_mode(shards, operators_of(device), on_built=_pack_after_loading)
    return replace(context, exact=mode)


class PackExactly(compat.QuantizeMethodBase):
    """The hook by which vLLM packs a layer after each load or reload of its weights."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Never called: the library has created them."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never called: the layer has its own forward."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack the layer's weight."""
        layer.pack()  # pyrefly: ignore  # an `ExactLinear`, or experts


def _pack_after_loading(layer: nn.Module) -> None:
    layer.quant_method = PackExactly()  # pyrefly: ignore  # vLLM's convention


def _duplicate_single_row(multiply: Any, x: torch.Tensor) -> torch.Tensor:
    if len(x) != 1:
        return multiply(x.contiguous())
    return multiply(x.expand(2, -1).contiguous())[:1]


def _invariant_matmul(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return compat.batch_invariant().linear_batch_invariant(x, weight)
