"""Which kernel serves a request, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from polyshard.attention.kernels.cpu.kernels import Chunked, Cpu, CpuFlash, CpuNative
from polyshard.attention.kernels.cuda.flash_attn_2 import FlashAttn2
from polyshard.attention.kernels.cuda.flash_attn_3 import FlashAttn3
from polyshard.attention.kernels.cuda.flash_attn_4 import FlashAttn4
from polyshard.attention.kernels.cuda.torch_varlen import TorchVarlen
from polyshard.attention.kernels.flex import Flex
from polyshard.attention.kernels.operator import register_kernel
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


# Fastest first; flex stands after the CPU's own, as there it has no backward and is slower.
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
)
_register(KERNELS)

FORMER_NAMES = {"cpu_fused": "cpu_native", "vllm_pinned": "vllm_exact"}


@cache
def servers_kernels() -> Sequence[AttentionKernel]:
    """The kernels of serving engines, from adapters with an attribute `attention_kernels`; taken by name alone.

    They give a server's own numbers, and cost the import of that server.
    """
    found: list[AttentionKernel] = []
    for adapter in installed_adapters():
        found += getattr(adapter, "attention_kernels", ())
    _register(found)
    return tuple(found)


def kernel_named(name: str) -> AttentionKernel:
    """A kernel by its name.

    Raises:
        ConfigurationError: there is none.
    """
    for kernels in (lambda: KERNELS, servers_kernels):  # a server is imported only if the name is none of ours
        for kernel in kernels():
            if kernel.name == name:
                return kernel
            if name in FORMER_NAMES and FORMER_NAMES[name] == kernel.name:
                deprecated(f"attention kernel {name!r}", repr(kernel.name))
                return kernel
    known = [kernel.name for kernel in (*KERNELS, *servers_kernels())]
    raise ConfigurationError(f"unknown attention kernel {name!r}; known: {', '.join(known)}")


def explain(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> list[Accepted | Rejected]:
    """The verdict on every kernel: fastest first, then those that are taken by name alone."""
    asked = _asked(spec, training)
    return [_verdict(kernel, asked, device, dtype, training) for kernel in (*KERNELS, *servers_kernels())]


def select_kernel(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool, name: str | None = None
) -> AttentionKernel:
    """The fastest kernel that can do all that is asked.

    Args:
        spec: the request.
        device: of the tensors.
        dtype: of the tensors.
        training: whether dropout applies, and a backward will come.
        name: force this kernel; default the environment variable POLYSHARD_ATTENTION, else free choice.

    Raises:
        ConfigurationError: the forced kernel is unknown or cannot do it, or none can; the message gives each reason.
    """
    return _select(_asked(spec, training), device, dtype, training, name or ATTENTION.read())


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
    wanted = f"attention kernel {forced!r} was asked for, but" if forced else "no attention kernel fits:"
    raise ConfigurationError(f"{wanted} {'; '.join(reasons)}")


def _verdict(
    kernel: AttentionKernel, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool
) -> Accepted | Rejected:
    reason = kernel.unsupported_reason(spec, device, dtype, training)
    return Accepted(kernel.name) if reason is None else Rejected(kernel.name, reason)


def _asked(spec: AttentionSpec, training: bool) -> AttentionSpec:
    """Without dropout where it does not apply, and without what no kernel depends on."""
    return replace(spec, dropout=spec.dropout if training else 0.0, layer_index=None)
