"""What exact mode computes with: vLLM's operators, where a row's bits do not depend on the batch that it stands in.

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
from polyshard.adapters.vllm.attention.exact import whose_kernel
from polyshard.adapters.vllm.layers.matmul import select_matmul
from polyshard.adapters.vllm.layers.norm import rms_norm, takes_norm
from polyshard.attention.rotary import rotate_heads
from polyshard.core.context import GroupContext
from polyshard.core.errors import ConfigurationError, LayoutError, RegistrationError
from polyshard.core.exact_mode import ExactOperators, Matmul
from polyshard.core.serving import RegisteredModel
from polyshard.exact.context import check_shards, exact_mode
from polyshard.exact.linear import ExactLinear
from polyshard.native.matmul import PackedProduct, unsupported_reason

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)
_NO_PRODUCT = "exact mode has no product of {} on this CPU, but of {}: use one of them on both sides"


class CpuOperators:
    """`ExactOperators` on CPU."""

    attention_kernel = "vllm_exact"

    @property
    def matmul_by_dtype(self) -> str:
        """The compiled product, or vLLM's."""
        return _by_dtype(products())

    @property
    def attention_by_dtype(self) -> str:
        """The compiled loops, or vLLM's kernel."""
        return _by_dtype({dtype: whose_kernel(dtype) for dtype in products()})

    def pack(self, weight: torch.Tensor) -> Matmul:
        """The compiled product; where oneDNN is faster oneDNN's, by which a row goes as two: it has another kernel."""
        if weight.dtype not in products():
            raise ConfigurationError(no_product(weight.dtype))
        if products()[weight.dtype] == "native":
            return PackedProduct(weight)
        return partial(_two_rows, compat.cpu_packed_product(weight))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The engine's operator; torch's operations where it does not take the size."""
        return (rms_norm if takes_norm(x) else plain_rms_norm)(x, weight, eps)

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's operator, on copies; torch's operations where it does not take the size."""
        if not compat.takes_rotary(q, cos):
            return rotate_heads(q, k, cos, sin)
        table = torch.cat((cos, sin), dim=-1).expand(*q.shape[:-2], 1, -1).flatten(0, -2)
        rows = torch.arange(len(table))
        q, k = (t.clone(memory_format=torch.contiguous_format) for t in (q, k))
        flat_q, flat_k = (t.view(len(table), -1) for t in (q, k))
        compat.rotate_in_place(rows, flat_q, flat_k, q.shape[-1], table)
        return q, k


@functools.cache
def products() -> dict[torch.dtype, str]:
    """Dtypes that have an exact product on this CPU, and whose it is: compiled, or vLLM's where that was looked at."""
    found = {}
    for dtype in (*ONEDNN_DTYPES, torch.float16):
        if dtype in ONEDNN_DTYPES and select_matmul(dtype) == "vllm":
            if compat.has_packed_product(dtype):
                found[dtype] = "vllm"
        elif unsupported_reason(dtype) is None:
            found[dtype] = "native"
    return found


def _by_dtype(kinds: dict[torch.dtype, str]) -> str:
    return ", ".join(f"{kind} {str(dtype).removeprefix('torch.')}" for dtype, kind in kinds.items())


def no_product(dtype: torch.dtype) -> str:
    """Why a dtype is refused."""
    return _NO_PRODUCT.format(dtype, ", ".join(map(str, products())))


class CudaOperators:
    """`ExactOperators` on CUDA, by vLLM's batch-invariant Triton operators. Unverified: docs/how-to/gpu.md."""

    attention_kernel = "vllm_exact"
    matmul_by_dtype = "Triton"
    attention_by_dtype = "flash-attention"

    def pack(self, weight: torch.Tensor) -> Matmul:
        """Its persistent matrix product, whose tiles do not depend on the number of rows."""
        return partial(_invariant_product, weight.detach())

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Its norm."""
        return compat.batch_invariant().rms_norm_batch_invariant(x, weight, eps)

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """torch's elementwise operations: no sum, so no order."""
        return rotate_heads(q, k, cos, sin)


def operators_of(device: torch.device) -> ExactOperators:
    """Those for a device.

    Raises:
        ConfigurationError: there are none.
    """
    if device.type == "cpu":
        return CpuOperators()
    if device.type == "cuda":
        return CudaOperators()
    raise ConfigurationError(f"exact mode runs on CPU and CUDA, not on {device.type}")


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm in torch's operations."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def exact_serving(context: GroupContext, registered: RegisteredModel, vllm_config: compat.VllmConfig) -> GroupContext:
    """The context of a worker that serves in exact mode.

    Raises:
        RegistrationError: the engine's settings change the bits.
    """
    device, cached = context.device, vllm_config.cache_config.cache_dtype
    why = None
    if not compat.is_eager(vllm_config):
        why = "the compiler fuses and reorders operations: start the engine with enforce_eager=True"
    elif vllm_config.quant_config is not None or vllm_config.lora_config is not None:
        why = "quantized weights and LoRA have kernels of their own"
    elif cached not in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        why = f"a KV cache of {cached} rounds keys and values, which training does not"
    elif device.type == "cpu" and compat.model_dtype(vllm_config) not in products():
        why = no_product(compat.model_dtype(vllm_config))
    elif device.type == "cuda" and not compat.is_batch_invariant():
        why = "on CUDA it needs the environment variable VLLM_BATCH_INVARIANT=1"
    if why is not None:
        raise RegistrationError(f"model {registered.name!r} was registered with exact=True: {why}")
    try:
        shards = check_shards(registered.exact_shards, context.layout.tensor)
    except LayoutError as error:
        raise RegistrationError(f"model {registered.name!r}: {error}") from None
    mode = exact_mode(shards, operators_of(device), on_built=_pack_after_loading)
    return replace(context, exact=mode)


class PackExactly(compat.QuantizeMethodBase):
    """How vLLM is told to pack a layer after each loading, a reload's too."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Never asked: the library made them."""
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Never asked: the layer has a forward of its own."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack."""
        assert isinstance(layer, ExactLinear)
        layer.pack()


def _pack_after_loading(layer: nn.Module) -> None:
    layer.quant_method = PackExactly()  # pyrefly: ignore  # vLLM's convention


def _two_rows(multiply: Any, x: torch.Tensor) -> torch.Tensor:
    if len(x) != 1:
        return multiply(x.contiguous())
    return multiply(x.expand(2, -1).contiguous())[:1]


def _invariant_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return compat.batch_invariant().linear_batch_invariant(x, weight)
