"""A sum over chunks whose gradients are computed in the forward pass, while the chunk's activations are in memory.

Source: the chunked linear cross-entropy of Liger Kernel (Hsu et al. 2024), here for any function of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_GATHERED_PER_CALL = "_polyshard_gathered_per_call"


def sum_with_gradients(
    compute: Compute, inputs: torch.Tensor, rows: Sequence[torch.Tensor], ids: Sequence[torch.Tensor]
) -> torch.Tensor | None:
    """Return the sum of `compute(rows[i], ids[i])` over all chunks and elements; a scalar.

    Gradients reach `inputs` and every parameter that `compute` uses. Collectives of their backward passes run here, in
    the same order on every rank.

    Args:
        compute: figures of a chunk's tokens; it must use nothing that requires a gradient but its first argument and
            leaf tensors.
        inputs: `[...]`, from which `rows` are taken.
        rows: views of `inputs`, which cover it.
        ids: the second argument of `compute` for each chunk.

    Returns:
        The scalar, or None if this way is impossible: nothing requires a gradient, a parameter has gradient hooks,
        which would run twice, or it is marked by `mark_gathered_per_call`.
    """
    of_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    parts = _parts_like(rows, inputs, of_inputs)
    leaves: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    values = []
    for index, (row, part_ids) in enumerate(zip(rows, ids)):
        with torch.enable_grad():
            leaf = row.detach().requires_grad_(inputs.requires_grad)
            # A view, since hooks that wait for the gradient of a module's input reject a leaf in autograd.grad.
            figures = compute(leaf.view_as(leaf), part_ids)
            value = figures.sum()
        values.append(figures.detach().reshape(-1))
        if index == 0:
            leaves = [found for found in _leaves(value) if found is not leaf]
        if not value.requires_grad or any(_has_hooks(leaf) for leaf in leaves):
            return None
        with without_autocast(inputs.device.type):
            wanted = [leaf, *leaves] if leaf.requires_grad else leaves
            gradients = list(torch.autograd.grad(value, wanted))
        if leaf.requires_grad:
            parts[index].copy_(gradients.pop(0))
        if index == 0:
            sums = [g.to(_accumulated(g.dtype)) if len(rows) > 1 else g for g in gradients]
        else:
            for total, gradient in zip(sums, gradients):
                total.add_(gradient)
    total = torch.cat(values).sum()
    return _Precomputed.apply(total, inputs, of_inputs, len(leaves), *leaves, *sums)  # pyrefly: ignore


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast, which does not exist on the meta device."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def mark_gathered_per_call(parameters: Iterable[nn.Parameter]) -> None:
    """Mark parameters that a library gathers for each call of their module, by hooks that count forward and backward.

    A backward pass within the forward pass would come at a time that such a library does not expect (ZeRO stage 3).
    """
    for parameter in parameters:
        setattr(parameter, _GATHERED_PER_CALL, True)


def _has_hooks(leaf: torch.Tensor) -> bool:
    return bool(leaf._backward_hooks) or getattr(leaf, _GATHERED_PER_CALL, False)


def _parts_like(rows: Sequence[torch.Tensor], inputs: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views of `gradient` that lie in it as `rows` lie in `inputs`."""
    if rows[0].dim() == inputs.dim():
        return gradient.split([row.shape[-2] for row in rows], dim=-2)
    return gradient.view(-1, inputs.shape[-1]).split([len(row) for row in rows])


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _leaves(value: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaf tensors of a graph that require a gradient, in the order of a walk from its end."""
    found: list[torch.Tensor] = []
    seen: set[Any] = set()
    nodes: list[Any] = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return found


class _Precomputed(torch.autograd.Function):
    """A scalar with known gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        inputs: torch.Tensor,
        of_inputs: torch.Tensor,
        count: int,
        *leaves_and_sums: torch.Tensor,
    ) -> torch.Tensor:
        del inputs
        leaves, sums = leaves_and_sums[:count], leaves_and_sums[count:]
        ctx.save_for_backward(of_inputs, *sums)
        ctx.dtypes = [leaf.dtype for leaf in leaves]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (scale,) = gradients
        of_inputs, *sums = ctx.saved_tensors
        scaled = [(value * scale.to(value.dtype)).to(dtype) for value, dtype in zip(sums, ctx.dtypes)]
        return (None, of_inputs * scale.to(of_inputs.dtype), None, None, *scaled, *(None for _ in sums))
