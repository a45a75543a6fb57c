"""All code that depends on the version of torch."""

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
    """The address of the store; places that differ only in timeout are equal."""

    address: str
    port: str
    rank: str
    timeout: float = field(compare=False)


@lru_cache(maxsize=1)
def _rendezvous(place: _Place) -> dist.Store:
    store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=place.timeout))))
    return store


def rendezvous_store(timeout: float) -> dist.Store:
    """Return the store of torchrun's agent, or of rank 0 without torchrun; it is kept for the life of the process.

    If rank 0 closed the store with its process group, the next initialization could hang: other ranks might still
    connect to the old store and wait there forever.
    """
    place = _Place(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"], timeout)
    return _rendezvous(place)


def fsdp_function() -> Callable[..., Any]:
    """Return `fully_shard`, which is public from torch 2.6."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard


def mixed_precision_policy(compute: torch.dtype | None, reduce: torch.dtype | None) -> Any:
    """FSDP2's policy: dtype of gathered parameters and inputs, and of the reduction of gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)


def offload_policy(device: torch.device) -> Any:
    """FSDP2's policy that keeps shards on the CPU; pinned memory needs an accelerator."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=device.type != "cpu")


def all_gather_flat(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> None:
    """All-gather into one tensor; the function was renamed in torch 2.13."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, source, group=group)


def reduce_scatter_flat(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> None:
    """Reduce-scatter one tensor with a sum; the function was renamed in torch 2.13."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(output, source, group=group)


def local_tensor(tensor: Any) -> Any:
    """Return the local part of a DTensor, or the tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def full_tensor(tensor: Any) -> Any:
    """Return a DTensor gathered over its mesh (a collective), on the mesh's device, or the tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    kind = tensor.device_mesh.device_type
    return (tensor if tensor.device.type == kind else tensor.to(kind)).full_tensor()  # offloaded shards are on the CPU


def is_dtensor(tensor: Any) -> bool:
    """Whether the tensor is a DTensor, that is, sharded by FSDP2."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh")


def sharded_rows(tensor: Any) -> tuple[int, Tensor]:
    """Return the offset of this rank's rows in the flattened FSDP2 parameter, and the rows.

    FSDP2 splits dimension 0 as torch.chunk does (fsdp/_fully_shard/_fsdp_param.py, _init_sharded_param).
    """
    (placement,) = tensor.placements
    assert placement.dim == 0, f"FSDP2 must shard dimension 0: got {placement}"
    mesh = tensor.device_mesh
    rows = tensor.shape[0]
    first = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    local = tensor.to_local()
    return first * (tensor.numel() // rows if rows else 0), local


def unshard_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Turn FSDP2's gradient synchronization on or off, for gradient accumulation."""
    module.set_requires_gradient_sync(enabled)  # pyrefly: ignore  # FSDPModule adds it at run time


def _fsdp_modules(module: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 shards."""
    return [part for part in module.modules() if hasattr(part, "set_requires_gradient_sync")]


def reshard(module: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered, so that `parameters()` are the shards that the optimizer updates.

    The root stays gathered after a forward pass that no backward pass follows, in the dtype of computation. Its
    parameters are then copies, of which neither the optimizer nor a later all-gather knows.
    """
    for part in _fsdp_modules(module):
        part.reshard()


def drop_accumulated_gradients(module: nn.Module) -> None:
    """Drop what FSDP2 has accumulated without synchronization, and the state of a step that an error interrupted.

    The optimizer's `zero_grad` knows only the gradients of shards (_fsdp_param_group.py, post_backward).
    """
    for part in _fsdp_modules(module):
        state: Any = part._get_fsdp_state()
        if state._is_root and hasattr(part, "reset_iter_state"):  # from torch 2.13
            part.reset_iter_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for held in (held for group in groups if group is not None for held in group.fsdp_params):
            held.unsharded_accumulated_grad = None
            if getattr(held, "_unsharded_param", None) is not None:
                held._unsharded_param.grad = None


# Gloo raises a plain RuntimeError; these words occur in messages of its transport and of the process group.
_GLOO_WORDS = (
    "gloo",
    "connection closed by peer",
    "pair closure",
    "timed out",
    "connection reset",
    "broken pipe",
    "nccl",
)


def is_communication_error(error: BaseException) -> bool:
    """Whether torch.distributed raised the error, and not the user's code."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and any(word in text for word in _GLOO_WORDS)
