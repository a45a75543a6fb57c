"""Recording of one forward and backward pass on the meta device: memory over time, FLOPs, and communication.

Tensors of the meta device have sizes and lifetimes but no memory. Autograd saves and frees them as it does on a GPU, so
that the peak of their sizes is that of a real run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from polyshard.attention.kernels.arguments import named
from polyshard.layers import collective_operators as operators
from polyshard.planning.contexts import ROTATE, axis_of_key
from polyshard.planning.shapes import ShapeCache

_COLLECTIVES = {
    operators.all_reduce: "all_reduce",
    operators.all_gather: "all_gather",
    operators.reduce_scatter: "reduce_scatter",
    operators.all_to_all: "all_to_all",
    ROTATE: "send",
}
_ATTENTION = torch.ops.polyshard.attention.default
_ATTENTION_BACKWARD = torch.ops.polyshard.attention_backward.default


@dataclass(frozen=True, slots=True)
class Flops:
    """Executed FLOPs: 2 for each multiplication and addition.

    Attributes:
        matmul: of matrix products.
        attention: of attention, over the pairs of a query and a key that the mask keeps.
        attention_square: of attention, over all pairs, as torch's FLOP counter counts them.
    """

    matmul: int = 0
    attention: int = 0
    attention_square: int = 0

    @property
    def total(self) -> int:
        """The FLOPs that a kernel needs which skips masked pairs."""
        return self.matmul + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.attention_square + other.attention_square,
        )

    def __sub__(self, other: Flops) -> Flops:
        return self + other.times(-1)

    def times(self, factor: int) -> Flops:
        """Return the FLOPs of `factor` such passes."""
        return Flops(self.matmul * factor, self.attention * factor, self.attention_square * factor)


@dataclass(frozen=True, slots=True)
class Level:
    """The largest memory at one level of accumulated gradients.

    Attributes:
        in_block: whether a block was computing, whose parameters an engine may gather for that time only.
        in_loss: whether the loss was computing, of which libraries keep more or fewer tensors.
        copied: whether a gradient is still held beside the one that was just accumulated from it.
        gradients: bytes of accumulated gradients.
        live: bytes of all other tensors.
    """

    in_block: bool
    in_loss: bool
    copied: bool
    gradients: int
    live: int


@dataclass(frozen=True, slots=True)
class State:
    """The counters at one moment."""

    live: int
    gradients: int
    flops: Flops
    traffic: Counter[tuple[str, str]]


class Recorder(TorchDispatchMode):
    """Counts what operations on the meta device would allocate, compute and communicate.

    Attributes:
        live: bytes of all tensors at this moment, without accumulated gradients.
        gradients: bytes of accumulated gradients at this moment.
        in_block: whether a block computes at this moment.
        in_loss: whether the loss computes at this moment.
        flops: executed FLOPs so far.
        traffic: payload bytes by axis and operation: the full tensor of a reduction, the result of an all-gather, and
            the input of an all-to-all or a send.
    """

    def __init__(self, held: Iterable[torch.Tensor], shapes: ShapeCache | None = None) -> None:
        super().__init__()
        self._shapes = shapes or ShapeCache()
        self.live = self.gradients = 0
        self.in_block = self.in_loss = False
        self._levels: dict[tuple[bool, bool, bool, int], int] = {}
        self.flops = Flops()
        self.traffic: Counter[tuple[str, str]] = Counter()
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: t for t in held}

    def state(self) -> State:
        """Return the counters."""
        return State(self.live, self.gradients, self.flops, self.traffic.copy())

    def levels(self) -> tuple[Level, ...]:
        """Return the largest memory at each level of accumulated gradients."""
        return tuple(Level(*key, live) for key, live in self._levels.items())

    def add(self, live: int = 0, gradients: int = 0, flops: Flops | None = None, traffic: Any = None) -> None:
        """Add to the counters what was not executed."""
        self.live += live
        self.gradients += gradients
        self.flops += flops or Flops()
        self.traffic.update(traffic or {})
        self._look()

    def accumulated(self, parameter: torch.Tensor) -> None:
        """Count the gradient of a parameter as accumulated: a hook for after its accumulation."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        held = self._storages.get(key)
        if isinstance(held, weakref.ref):
            self._storages[key] = parameter.grad
            nbytes = parameter.grad.untyped_storage().nbytes()
            self.gradients += nbytes
            self._look(copied=True)
            self.live -= nbytes
            self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        out = self._shapes.call(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self._hold(tensor)
        self._count(func, args, kwargs or {}, out)
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._storages or not nbytes:
            return

        def freed(reference: Any) -> None:
            if self._storages.get(key) is reference:
                del self._storages[key]
                self.live -= nbytes

        self._storages[key] = weakref.ref(storage, freed)
        self.live += nbytes
        self._look()

    def _look(self, copied: bool = False) -> None:
        key = (self.in_block, self.in_loss, copied, self.gradients)
        self._levels[key] = max(self._levels.get(key, 0), self.live)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        kind = _COLLECTIVES.get(func)
        if kind is not None:
            payload = out if kind == "all_gather" else args[0]
            self.traffic[axis_of_key(args[1]), kind] += payload.nbytes
        elif func is _ATTENTION:
            self.flops += _attention_flops(args[:3], args[3:], 2)
        elif func is _ATTENTION_BACKWARD:
            self.flops += _attention_flops(args[1:4], args[7:], 4)
        elif func._overloadpacket in flop_registry:
            self.flops += Flops(matmul=flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))


def _attention_flops(qkv: Any, flat: Any, factor: int) -> Flops:
    """Return the FLOPs of a forward pass (factor 2) or a backward pass (factor 4: two gradients per product)."""
    q, _, v = qkv
    arguments = named(tuple(flat))
    queries = arguments.tensors.host_queries.diff().tolist()
    keys = arguments.tensors.host_keys
    seen = queries if keys is None else keys.diff().tolist()
    each = factor * q.shape[1] * (q.shape[2] + v.shape[2])
    settings = arguments.settings
    kept = sum(_kept_pairs(n, m, settings.causal, settings.sliding_window) for n, m in zip(queries, seen))
    return Flops(0, each * kept, each * sum(n * m for n, m in zip(queries, seen)))


def _kept_pairs(queries: int, keys: int, causal: bool, window: int | None) -> int:
    """Return the pairs that the mask keeps; the queries are the last tokens of the keys."""
    if not causal:
        return queries * (keys if window is None else min(keys, 2 * window - 1))
    reach = keys if window is None else min(window, keys)
    first = keys - queries + 1  # keys that the first query can see, without a window
    ramp = max(0, min(queries, reach - first + 1))
    return ramp * first + ramp * (ramp - 1) // 2 + (queries - ramp) * reach
