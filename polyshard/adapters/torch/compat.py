"""All that depends on torch's version."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class _Place:
    """Where the store is: one for each, whatever the timeout."""

    address: str
    port: str
    rank: str
    timeout: float = field(compare=False)


@lru_cache(maxsize=1)
def _rendezvous(place: _Place) -> dist.Store:
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=place.timeout))))
    return store


def rendezvous_store(timeout: float) -> dist.Store:
    """The store of torchrun's agent, or of rank 0 where there is none; held for the life of the process.

    A store that rank 0 closed with its process group would take the others' next initialisation down with it: they may
    still connect to the old one, and wait there for ever.
    """
    place = _Place(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"], timeout)
    return _rendezvous(place)


def fsdp_function() -> Callable[..., Any]:
    """`fully_shard`; public since torch 2.6."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard


def mixed_precision_policy(compute: torch.dtype | None, reduce: torch.dtype | None) -> Any:
    """FSDP2's policy: dtype of gathered parameters and inputs, and of the reduction of gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)


def all_gather_flat(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> None:
    """All-gather into one tensor; renamed in torch 2.13."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, source, group=group)


def reduce_scatter_flat(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> None:
    """Sum and scatter from one tensor; renamed in torch 2.13."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, source, group=group)


def local_tensor(tensor: Any) -> Any:
    """A DTensor's local part, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def full_tensor(tensor: Any) -> Any:
    """A DTensor gathered over its mesh (a collective), or the tensor itself."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_dtensor(tensor: Any) -> bool:
    """Whether FSDP2 holds this parameter as a shard."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def sharded_rows(tensor: Any) -> tuple[int, Tensor]:
    """The local rows of a parameter that FSDP2 shards, and the place of the first element in the flattened whole.

    FSDP2 cuts dimension 0 as torch.chunk does (fsdp/_fully_shard/_fsdp_param.py, _init_sharded_param).
    """
    (placement,) = tensor.placements
    assert placement.dim == 0, f"FSDP2 shards dimension 0, this tensor {placement}"
    mesh = tensor.device_mesh
    rows = tensor.shape[0]
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    local = tensor.to_local()
    return first * (tensor.numel() // rows if rows else 0), local


def unshard_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """FSDP2's switch for gradient accumulation."""
    module.set_requires_gradient_sync(enabled)  # pyrefly: ignore  # FSDPModule adds it at run time


# Gloo raises a plain RuntimeError; these are the words of its transport and of the process group's wait.
_GLOO_WORDS = ("gloo", "connection closed by peer", "timed out", "connection reset", "broken pipe", "nccl")


def is_communication_error(error: BaseException) -> bool:
    """Whether torch.distributed, and not the user's code, raised this."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and any(word in text for word in _GLOO_WORDS)
