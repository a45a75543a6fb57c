"""Which kernel serves a request, and why the others do not."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from polyshard.attention.kernels.chunked import Chunked
from polyshard.attention.kernels.cpu_flash import CpuFlash
from polyshard.attention.kernels.protocol import AttentionKernel
from polyshard.attention.kernels.torch_varlen import TorchVarlen
from polyshard.core.attention import AttentionSpec
from polyshard.core.capabilities import Accepted, Rejected
from polyshard.core.errors import ConfigurationError

KERNELS: Sequence[AttentionKernel] = (TorchVarlen(), CpuFlash(), Chunked())  # fastest first

ENVIRONMENT_VARIABLE = "POLYSHARD_ATTENTION"


def explain(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool) -> list[Accepted | Rejected]:
    """The verdict on every kernel, fastest first."""
    verdicts: list[Accepted | Rejected] = []
    for kernel in KERNELS:
        reason = kernel.rejects(spec, device, dtype, training)
        verdicts.append(Accepted(kernel.name) if reason is None else Rejected(kernel.name, reason))
    return verdicts


def select_kernel(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, training: bool, name: str | None = None
) -> AttentionKernel:
    """The fastest kernel that can do all that is asked.

    Args:
        spec: the request.
        device: of the tensors.
        dtype: of the tensors.
        training: whether dropout applies.
        name: force this kernel; default the environment variable POLYSHARD_ATTENTION, else free choice.

    Raises:
        ConfigurationError: the forced kernel is unknown or cannot do it, or none can; the message gives each reason.
    """
    forced = name or os.environ.get(ENVIRONMENT_VARIABLE) or None
    known = {kernel.name: kernel for kernel in KERNELS}
    if forced is not None and forced not in known:
        raise ConfigurationError(f"unknown attention kernel {forced!r}; known: {', '.join(known)}")
    verdicts = explain(spec, device, dtype, training)
    for verdict in verdicts:
        if isinstance(verdict, Accepted) and forced in (None, verdict.name):
            return known[verdict.name]
    reasons = "; ".join(str(v) for v in verdicts if isinstance(v, Rejected) and forced in (None, v.name))
    wanted = f"attention kernel {forced!r} was asked for, but" if forced else "no attention kernel fits:"
    raise ConfigurationError(f"{wanted} {reasons}")
