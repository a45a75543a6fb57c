"""Kernel selection: the fastest kernel that supports a request, and the reasons why others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from polyshard.attention.kernels.attention_operator import register_kernel
from polyshard.attention.kernels.cpu.kernels import Chunked, Cpu, CpuFlash, CpuNative
from polyshard.attention.kernels.cuda.flash_attn_2 import FlashAttn2
from polyshard.attention.kernels.cuda.flash_attn_3 import FlashAttn3
from polyshard.attention.kernels.cuda.flash_attn_4 import FlashAttn4
from polyshard.attention.kernels.cuda.torch_varlen import TorchVarlen
from polyshard.attention.kernels.flex import Flex
from polyshard.attention.kernels.meta import Meta
from polyshard.attention.kernels.protocol import AttentionKernel, BlockKernel
from polyshard.core.attention import AttentionSpec
from polyshard.core.capabilities import Accepted, Rejected
from polyshard.core.discovery import installed_adapters
from polyshard.core.environment import ATTENTION, deprecated
from polyshard.core.errors import ConfigurationError


def _register(kernels: Sequence[AttentionKernel]) -> None:
    for kernel in kernels:
        if isinstance(kernel, BlockKernel):
            register_kernel(kernel)


# Fastest first. Flex comes after the CPU kernels because on CPU it has no backward pass and is slower.
KERNELS: Sequence[AttentionKernel] = (
    FlashAttn4(),
    FlashAttn3(),
    FlashAttn2(),
    TorchVarlen(),
    Cpu(),
    CpuNative(),
    CpuFlash(),
    Flex(),
    Chunked(),
    Meta(),
)
_register(KERNELS)

FORMER_NAMES = {"cpu_fused": "cpu_native", "vllm_pinned": "vllm_exact"}


@cache
def servers_kernels() -> Sequence[AttentionKernel]:
    """Return the kernels of servers, from adapters with an attribute `attention_kernels`. They are used only by name.

    They compute the same numbers as the server. Calling this function imports the server's library.
    """
    found: list[AttentionKernel] = []
    for adapter in installed_adapters():
        found += getattr(adapter, "attention_kernels", ())
    _register(found)
    return tuple(found)


def kernel_named(name: str) -> AttentionKernel:
    """Return the kernel with the given name.

    Raises:
        ConfigurationError: no kernel has that name.
    """
    for kernels in (lambda: KERNELS, servers_kernels):  # imports a server only if the name is not in KERNELS
        for kernel in kernels():
            if kernel.name == name:
                return kernel
            if name in FORMER_NAMES and FORMER_NAMES[name] == kernel.name:
                deprecated(f"attention kernel {name!r}", repr(kernel.name))
                return kernel
    known = [kernel.name for kernel in (*KERNELS, *servers_kernels())]
    raise ConfigurationError(f"The attention kernel is unknown: got {name!r}, expected one of {', '.join(known)}.")


def explain(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> list[Accepted | Rejected]:
    """Return the verdict on every kernel: fastest first, then the servers' kernels, which are used only by name.

    Args:
        spec: the request.
        device: device of the tensors.
        dtype: dtype of the tensors.
        training: whether dropout applies and a backward pass follows.

    Examples:
        >>> from polyshard.core import AttentionSpec
        >>> spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125, softcap=50.0)
        >>> for verdict in explain(spec, torch.device("cpu"), torch.float32, training=True)[4:7]:
        ...     print(verdict)
        Accepted(name='cpu')
        cpu_native: has no softcap
        cpu_flash: has no softcap
    """
    request = _normalized(spec, training)
    return [_verdict(kernel, request, device, dtype, training) for kernel in (*KERNELS, *servers_kernels())]


def select_kernel(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool, name: str | None = None
) -> AttentionKernel:
    """Return the fastest kernel that supports a request.

    Args:
        spec: the request.
        device: device of the tensors.
        dtype: dtype of the tensors.
        training: whether dropout applies and a backward pass follows.
        name: name of the kernel to use; default: the environment variable POLYSHARD_ATTENTION, else the fastest one.

    Raises:
        ConfigurationError: the named kernel is unknown or does not support the request, or no kernel supports it; the
            message contains the reason of each.

    Examples:
        >>> from polyshard.core import AttentionSpec
        >>> spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125)
        >>> select_kernel(spec, torch.device("cpu"), torch.bfloat16, training=True).name
        'cpu'
    """
    forced = None if device.type == "meta" else name or ATTENTION.read()  # a plan has the shapes of any kernel
    return _select(_normalized(spec, training), device, dtype, training, forced)


@cache
def _select(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool, forced: str | None
) -> AttentionKernel:
    candidates = [kernel_named(forced)] if forced else KERNELS
    reasons = []
    for kernel in candidates:
        verdict = _verdict(kernel, spec, device, dtype, training)
        if isinstance(verdict, Accepted):
            return kernel
        reasons.append(str(verdict))
    if forced:
        raise ConfigurationError(
            f"Attention kernel {forced!r} does not support the request: {'; '.join(reasons)}. Select another kernel."
        )
    raise ConfigurationError(f"No attention kernel supports the request: {'; '.join(reasons)}.")


def _verdict(
    kernel: AttentionKernel, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
) -> Accepted | Rejected:
    reason = kernel.unsupported_reason(spec, device, dtype, training)
    return Accepted(kernel.name) if reason is None else Rejected(kernel.name, reason)


def _normalized(spec: AttentionSpec, training: bool) -> AttentionSpec:
    """Return the spec without dropout if it does not apply, and without the fields that no kernel depends on."""
    return replace(spec, dropout=spec.dropout if training else 0.0, layer_index=None)
