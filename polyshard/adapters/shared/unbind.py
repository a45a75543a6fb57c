"""`Tensor.unbind` for many large matrices, with a backward pass that writes each gradient directly into the result."""

from __future__ import annotations

from typing import Any

import torch


def unbind(stacked: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the slices of a tensor along its first dimension, as `Tensor.unbind` does.

    The gradient of `Tensor.unbind` keeps the gradients of all slices until the last has arrived, then copies them into
    one tensor. This copies each while it is in the processor's cache, and frees it. Slices without a gradient get
    zeros. There is no second derivative.

    Args:
        stacked: `[slices, ...]`.

    Examples:
        >>> import torch
        >>> stacked = torch.ones(2, 3, requires_grad=True)
        >>> first, second = unbind(stacked)
        >>> (first + 2 * second).sum().backward()
        >>> stacked.grad
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """
    if not (torch.is_grad_enabled() and stacked.requires_grad):
        return stacked.unbind(0)
    gradient = _Gradient(stacked.shape)
    token = _Stacked.apply(stacked, gradient)
    return tuple(_Slice.apply(token, part, gradient, index) for index, part in enumerate(stacked.detach().unbind(0)))


class _Gradient:
    """The gradient of the stacked tensor during a backward pass."""

    def __init__(self, shape: torch.Size) -> None:
        self._shape, self._written = shape, set[int]()
        self._whole: torch.Tensor | None = None

    def put(self, index: int, gradient: torch.Tensor) -> None:
        if self._whole is None:
            self._whole = gradient.new_empty(self._shape)
        self._whole[index].copy_(gradient)
        self._written.add(index)

    def take(self) -> torch.Tensor | None:
        whole, written, self._whole, self._written = self._whole, self._written, None, set()
        if whole is not None:
            for index in set(range(len(whole))) - written:
                whole[index].zero_()
        return whole


class _Stacked(torch.autograd.Function):
    """A scalar that depends on the stacked tensor: its gradient is asked for after those of all slices."""

    @staticmethod
    def forward(ctx: Any, stacked: torch.Tensor, gradient: _Gradient) -> torch.Tensor:
        ctx.gradient = gradient
        return stacked.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return ctx.gradient.take(), None


class _Slice(torch.autograd.Function):
    """One slice, as a function of that scalar."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, part: torch.Tensor, gradient: _Gradient, index: int) -> torch.Tensor:
        ctx.gradient, ctx.index = gradient, index
        ctx.save_for_backward(token)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.gradient.put(ctx.index, gradients[0])
        (token,) = ctx.saved_tensors
        return token, None, None, None
