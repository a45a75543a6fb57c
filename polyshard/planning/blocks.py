"""Equal blocks of a model are recorded once: the first and the last run, and those between are accounted for.

The largest memory is reached in the last block's forward or in the first block's backward pass, which both run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from polyshard.core.attention import AttentionSpec
from polyshard.planning.recorder import Recorder, State


@dataclass(eq=False)
class _Kind:
    """Blocks that are equal but for their weights' values."""

    indices: list[int] = field(default_factory=list)
    entered: State | None = None  # before the first block's forward pass
    left: State | None = None  # before the forward pass of the block after it
    begun: State | None = None  # before the last block's backward pass
    ended: State | None = None


class _Mark(torch.autograd.Function):
    """The identity, which calls a function in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.call()
        return gradients[0], None


def record_equal_blocks_once(model: nn.Module, recorder: Recorder) -> None:
    """Replace the forward of all but the first and last of equal blocks by an entry in the recorder's books.

    Blocks are the items of every `ModuleList`. They are equal if they have one class, and parameters and attention of
    equal shapes. A block that does not map its first argument to a tensor of the same shape runs as it is.

    Args:
        model: on the meta device, after `apply_recomputation`.
        recorder: counts the passes.
    """
    inner: set[int] = set()
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and id(part) not in inner:
            inner |= {id(child) for child in part.modules()}
            _List(part, recorder)


class _List:
    """The blocks of one ModuleList, whose forwards it replaces."""

    def __init__(self, blocks: nn.ModuleList, recorder: Recorder) -> None:
        self._recorder = recorder
        self._kinds: dict[Hashable, _Kind] = {}
        self._waiting: _Kind | None = None  # its first block is followed by the next that is entered
        self._alike = True  # whether all blocks so far mapped a tensor to one of the same shape
        items = list(blocks)  # of a later pipeline stage, the names do not begin at 0
        for index, block in enumerate(items):
            self._kinds.setdefault(signature(block), _Kind()).indices.append(index)
        for kind in self._kinds.values():
            for index in kind.indices:
                block = items[index]
                block.forward = self._recorded(block.forward, kind, index)

    def _recorded(self, forward: Callable[..., Any], kind: _Kind, index: int) -> Callable[..., Any]:
        first, last = index == kind.indices[0], index == kind.indices[-1]

        def run(x: Any, *args: Any, **kwargs: Any) -> Any:
            if self._waiting is not None:
                self._waiting.left, self._waiting = self._recorder.state(), None
            differentiable = isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled()
            if not first and not last and self._alike and differentiable:
                return self._skipped(kind, x)
            if first:
                kind.entered, self._waiting = self._recorder.state(), kind
            self._recorder.in_block = True
            out = forward(_Mark.apply(x, lambda: self._end(kind, last)) if differentiable else x, *args, **kwargs)
            self._recorder.in_block = False
            self._alike &= isinstance(out, torch.Tensor) and out.shape == x.shape and out.dtype == x.dtype
            return _Mark.apply(out, lambda: self._begin(kind, last)) if differentiable and self._alike else out

        return run

    def _begin(self, kind: _Kind, last: bool) -> None:
        self._recorder.in_block = True
        kind.begun = self._recorder.state() if last else kind.begun

    def _end(self, kind: _Kind, last: bool) -> None:
        self._recorder.in_block = False
        kind.ended = self._recorder.state() if last else kind.ended

    def _skipped(self, kind: _Kind, x: torch.Tensor) -> torch.Tensor:
        entered, left = kind.entered, kind.left
        assert entered is not None
        assert left is not None
        held = left.live - entered.live
        self._recorder.add(live=held, flops=left.flops - entered.flops, traffic=_difference(left, entered))
        return _Mark.apply(x, lambda: self._skipped_backward(kind, held))

    def _skipped_backward(self, kind: _Kind, held: int) -> None:
        begun, ended = kind.begun, kind.ended
        assert begun is not None
        assert ended is not None
        self._recorder.add(
            live=-held,
            gradients=ended.gradients - begun.gradients,
            flops=ended.flops - begun.flops,
            traffic=_difference(ended, begun),
        )


def signature(block: nn.Module) -> Hashable:
    """Return a key that equal blocks share: the class, and the shapes of parameters and attention."""
    shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    specs = (getattr(part, "spec", None) for part in block.modules())
    attention = tuple(repr(replace(spec, layer_index=None)) for spec in specs if isinstance(spec, AttentionSpec))
    return type(block), shapes, attention


def _difference(later: State, earlier: State) -> Counter[tuple[str, str]]:
    return Counter({key: count - earlier.traffic[key] for key, count in later.traffic.items()})
