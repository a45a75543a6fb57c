"""The custom operator that runs every `BlockKernel`: opaque to torch.compile, with autograd and sinks.

Sequence boundaries are tensor arguments of the operator, so that compiled code is valid for batches of any lengths.

A sink is one more term of the softmax's sum. The kernel runs without it, and its output is then scaled by the keys'
share of the sum. The kernel's backward pass needs no change if it gets the scaled output and the full logsumexp.
"""

from __future__ import annotations

from typing import Any

import torch

from polyshard.attention.kernels.arguments import Arguments, TensorArguments, named, pack, schema, unpack
from polyshard.attention.kernels.protocol import AttentionCall, BlockKernel
from polyshard.attention.kernels.softmax import sinks_gradient, wide, with_sinks
from polyshard.layers.forward_gradients import without_autocast

NAME = "attention"  # in the namespace `polyshard`
_QKV = "Tensor q, Tensor k, Tensor v"
_OUTPUT = "Tensor out, Tensor logsumexp, Tensor saved"
# Keyed by name, since an operator's arguments are plain values. `polyshard.attention.selection` registers the kernels.
_kernels: dict[str, BlockKernel] = {}


def register_kernel(kernel: BlockKernel) -> None:
    """Register a kernel with the operator. It replaces an earlier kernel of the same name."""
    _kernels[kernel.name] = kernel


def attend(
    kernel: BlockKernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Run `kernel` through the operator; see `AttentionKernel.attend`."""
    assert call.shifts is None, "parts of sequences are computed by ring.py, not by the operator"
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sinks))
    out, _, _ = _attention(q, k, v, *pack(kernel.name, call, sinks, differentiable).flat())
    return out


@torch.library.custom_op(
    f"polyshard::{NAME}", mutates_args=(), schema=f"({_QKV}, {schema()}) -> (Tensor, Tensor, Tensor)"
)
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *flat: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = named(flat)
    kernel, sinks = _kernels[arguments.settings.kernel], arguments.tensors.sinks
    # Kernels widen where they must; autocast would narrow it again, unless a dispatch mode such as that of selective
    # recomputation has switched it off.
    with without_autocast(q.device.type):
        out, logsumexp, saved = kernel.forward(q, k, v, unpack(q, k, v, arguments))
    if sinks is not None and not kernel.native_sinks:
        out, logsumexp = with_sinks(out, logsumexp, sinks)
    return out, logsumexp, saved


@_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Its size depends on the sequences' lengths. The meta kernel saves nothing, and plain meta tensors have no context.
    saved = 0 if q.device.type == "meta" else torch.library.get_ctx().new_dynamic_size()
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    return out, q.new_empty(q.shape[:2], dtype=wide(q.dtype)), q.new_empty(saved)


@torch.library.custom_op(
    "polyshard::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_QKV}, {_OUTPUT}, {schema()}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    saved: torch.Tensor,
    *flat: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = named(flat)
    kernel, sinks = _kernels[arguments.settings.kernel], arguments.tensors.sinks
    with without_autocast(q.device.type):
        grads = kernel.backward(grad_out, q, k, v, out, logsumexp, saved, unpack(q, k, v, arguments))
    return *grads, q.new_empty(0) if sinks is None else sinks_gradient(grad_out, out, logsumexp, sinks)


@_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    saved: torch.Tensor,
    *flat: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sinks = named(flat).tensors.sinks
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *flat = inputs
    tensors, ctx.settings = named(tuple(flat))
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, *unused: torch.Tensor | None) -> tuple[Any, ...]:
    del unused
    assert ctx.settings.differentiable, "the forward pass ran without saving for a backward pass"
    q, k, v, out, logsumexp, saved, *rest = ctx.saved_tensors
    tensors = TensorArguments(*rest)
    grads: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if grad_out is not None:
        flat = Arguments(tensors, ctx.settings).flat()
        grads = _attention_backward(grad_out, q, k, v, out, logsumexp, saved, *flat)
    grad_tensors = dict.fromkeys(TensorArguments._fields)
    if tensors.sinks is not None:
        grad_tensors |= {"sinks": grads[3]}
    return *grads[:3], *grad_tensors.values(), *([None] * len(ctx.settings))


_attention.register_autograd(_differentiate, setup_context=_save)
