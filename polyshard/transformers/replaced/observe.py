"""The arguments that a transformers attention module passes to its kernel, found by running it on the meta device.

The same attribute means different things in different families: EXAONE 4 has a `sliding_window` on layers that do not
use it, and rotates queries and keys only on those that do. The arguments of the call to transformers' attention
interface are unambiguous.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_NAME = "polyshard_observe"
_TOKENS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The arguments of one call to transformers' attention interface.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of a query or key head.
        value_dim: size of a value head.
        scale: factor on q·k.
        sliding_window: as passed; None if absent.
        softcap: as passed; None if absent.
        sinks: whether sinks were passed.
        rotary: whether the module read its position embeddings.
        other: names of further arguments that were passed and are not None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    sinks: bool
    rotary: bool
    other: tuple[str, ...]


class _Reached(Exception):
    """Raised at the module's call to the interface, to end its forward; carries the arguments."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], asked: dict[str, Any]) -> None:
        super().__init__()
        self.tensors, self.asked = tensors, asked


class _Noticing(torch.Tensor):
    """A cosine or sine that records whether it is used in a computation; reading its shape or dtype does not count."""

    used = False  # set on the class that `_noticing` creates for one observation

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            cls.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _noticing(tensor: torch.Tensor) -> tuple[torch.Tensor, type[_Noticing]]:
    kind = type("_NoticingOnce", (_Noticing,), {"used": False})
    return tensor.as_subclass(kind), kind


def observe(module: nn.Module, hidden_size: int) -> Observed | None:
    """Return the arguments that `module` passes to transformers' attention interface; None if it does not call it.

    The module runs on the meta device, so nothing is computed or changed.

    Args:
        module: a transformers attention module, on any device.
        hidden_size: size of its input.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "_attn_implementation"):
        return None
    tensors = {
        name: tensor.to("meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if isinstance(tensor, torch.Tensor)
    }
    like = next((t for t in tensors.values() if t.is_floating_point()), torch.empty(0))
    hidden = torch.empty(1, _TOKENS, hidden_size, device="meta", dtype=like.dtype)
    parameters = inspect.signature(module.forward).parameters
    for rotary_dim, complex_numbers in itertools.product(_rotary_dims(module, config), (False, True)):
        if complex_numbers:  # one number for the cosine and sine of a pair of channels
            angles = torch.empty(1, _TOKENS, rotary_dim // 2, device="meta", dtype=torch.complex64)
        else:
            angles = torch.empty(1, _TOKENS, rotary_dim, device="meta", dtype=like.dtype)
        angles, noticing = _noticing(angles)
        arguments: dict[str, Any] = {}
        if "position_embeddings" in parameters:
            arguments["position_embeddings"] = angles if complex_numbers else (angles, angles)
        if "attention_mask" in parameters:
            arguments["attention_mask"] = None
        if "position_ids" in parameters:
            arguments["position_ids"] = torch.zeros(1, _TOKENS, device="meta", dtype=torch.int64)
        try:
            with torch.no_grad(), torch.device("meta"), _observed(config), _evaluated(module):
                torch.func.functional_call(module, tensors, (hidden,), arguments)
        except _Reached as reached:
            return _read(reached, noticing.used)
        except (TypeError, RuntimeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError):
            continue
        return None
    return None


def _rotary_dims(module: Any, config: Any) -> list[int]:
    """Return possible sizes of cosine and sine, the most common first."""
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    head_dim = head_dim if isinstance(head_dim, int) else max(2, getattr(config, "hidden_size", 2) // heads)
    rope = getattr(config, "rope_parameters", None) or {}
    factors = (getattr(config, "partial_rotary_factor", None), rope.get("partial_rotary_factor"))
    partial = next((int(head_dim * f) for f in factors if isinstance(f, float)), head_dim)
    return list(dict.fromkeys((partial, head_dim, partial // 2)))


def _read(reached: _Reached, rotary: bool) -> Observed:
    q, k, v = reached.tensors
    asked = reached.asked
    scale = asked.pop("scaling", None)
    window, softcap, sinks = (asked.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    known = {"dropout", "is_causal", "position_ids", "attention_mask"}
    return Observed(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        sliding_window=window,
        softcap=None if softcap is None else float(softcap),
        sinks=sinks is not None,
        rotary=rotary,
        other=tuple(sorted(name for name, value in asked.items() if value is not None and name not in known)),
    )


def _interface(module: nn.Module, query: Any, key: Any, value: Any, *arguments: Any, **asked: Any) -> None:
    raise _Reached((query, key, value), asked)


@contextmanager
def _observed(config: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _interface)  # pyrefly: ignore  # it does not return
    with implementation(config, _NAME):
        yield


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.training = False
    try:
        yield
    finally:
        module.training = training


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    """Temporarily select another attention implementation for the modules of `config`."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
