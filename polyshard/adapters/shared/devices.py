"""The device of a rank, the backend of its process groups, and the check that its parameters are on the device."""

from __future__ import annotations

import os

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.environment import BACKEND
from polyshard.core.errors import ConfigurationError

_BACKENDS = ("nccl", "gloo")


def pick_backend(backend: str | None = None) -> str | None:
    """Return the process-group backend from the argument or the environment; None if neither is set.

    Raises:
        ConfigurationError: the backend is unknown.
    """
    chosen = backend or BACKEND.read()
    if chosen is not None and chosen not in _BACKENDS:
        source = "backend" if backend else f"environment variable {BACKEND.name}"
        raise ConfigurationError(f"{source} is unsupported: got {chosen!r}, expected one of {', '.join(_BACKENDS)}")
    return chosen


def default_backend(device: torch.device) -> str:
    """Return the backend for ranks that compute on `device`: `nccl` on GPUs, `gloo` elsewhere."""
    return pick_backend() or ("nccl" if device.type == "cuda" else "gloo")


def pick_device(device: str | torch.device | None, backend: str | None = None) -> torch.device:
    """Return the given device, else this rank's GPU, else the CPU. `cuda` without an index means this rank's GPU.

    With the `gloo` backend, ranks beyond the number of GPUs share them in turn.

    Raises:
        ConfigurationError: the device is unknown, this rank's GPU does not exist, or NCCL was requested for another
            device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigurationError(f"device is invalid: got {device!r}, expected 'cpu', 'cuda' or 'cuda:N'.") from None
    if where.type != "cuda":
        if backend == "nccl":
            raise ConfigurationError(f"backend nccl needs GPUs: got device {where}. Use backend='gloo'.")
        return where
    available = torch.cuda.device_count()
    number = int(os.environ.get("LOCAL_RANK", "0")) if where.index is None else where.index
    if backend == "gloo" and where.index is None and available:
        number %= available
    if number >= available:
        raise ConfigurationError(
            f"rank {os.environ.get('RANK', '0')} needs GPU {number}, but this machine has {available}. Start at most "
            "one rank per GPU, let ranks share GPUs with initialize(..., backend='gloo'), or use device='cpu'"
        )
    return torch.device("cuda", number)


def check_devices(model: nn.Module, context: ParallelContext) -> None:
    """Raise `ConfigurationError` if a parameter is not on its rank's device.

    polyshard creates its layers on that device; plain torch modules go to torch's default device.
    """
    for name, parameter in model.named_parameters():
        if not _same(parameter.device, context.device):
            raise ConfigurationError(
                f"parameter {name} is on {parameter.device}, but this rank computes on {context.device}. Call "
                "model.to(parallel_context.device), or build the model under `with parallel_context.device:`"
            )


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are equal; a device without an index matches any index."""
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)
