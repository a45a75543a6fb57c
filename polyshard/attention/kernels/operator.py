"""The custom operator around every kernel that has a forward and a backward: opaque to torch.compile, with sinks.

Boundaries are tensors here, so that compiled code holds for batches of any lengths.

A sink is one more term of the softmax's sum. So a kernel runs without, its output is scaled by the part of the sum that
the keys have, and its backward is right as it stands when it is given the scaled output and the whole logsumexp.
"""

from __future__ import annotations

from typing import Any

import torch

from polyshard.attention.kernels.protocol import AttentionCall, BlockKernel
from polyshard.attention.kernels.softmax import sinks_gradient, wide, with_sinks
from polyshard.core.attention import AttentionSpec, PackedSequences


def attend(
    kernel: BlockKernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: AttentionCall,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Run `kernel` through the operator; see `AttentionKernel.attend`."""
    assert call.shifts is None, "parts of sequences have a function of their own: ring.py"
    spec = call.spec
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sinks))
    out, _, _ = _attention(
        q,
        k,
        v,
        call.queries.cu_seqlens,
        call.queries.host,
        None if call.keys is call.queries else call.keys.cu_seqlens,
        None if call.keys is call.queries else call.keys.host,
        sinks,
        call.alibi_slopes,
        call.seed,
        kernel.name,
        spec.scale,
        spec.causal,
        spec.sliding_window,
        spec.softcap,
        spec.dropout,
        spec.head_offset,
        differentiable,
    )
    return out


@torch.library.custom_op("polyshard::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_queries: torch.Tensor,
    host_queries: torch.Tensor,
    cu_keys: torch.Tensor | None,
    host_keys: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    seed: torch.Tensor | None,
    kernel: str,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
    head_offset: int,
    differentiable: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bounds = (cu_queries, host_queries, cu_keys, host_keys, alibi_slopes, seed, sinks)
    settings = (scale, causal, sliding_window, softcap, dropout, head_offset, differentiable)
    chosen = _kernel(kernel)
    out, logsumexp, saved = chosen.forward(q, k, v, _call(q, k, v, bounds, settings))
    if sinks is not None and not chosen.native_sinks:
        out, logsumexp = with_sinks(out, logsumexp, sinks)
    return out, logsumexp, saved


@_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()  # lies in the lengths
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    return out, q.new_empty(q.shape[:2], dtype=wide(q.dtype)), q.new_empty(kept)


@torch.library.custom_op("polyshard::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    saved: torch.Tensor,
    cu_queries: torch.Tensor,
    host_queries: torch.Tensor,
    cu_keys: torch.Tensor | None,
    host_keys: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    seed: torch.Tensor | None,
    kernel: str,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
    head_offset: int,
    differentiable: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    bounds = (cu_queries, host_queries, cu_keys, host_keys, alibi_slopes, seed, sinks)
    settings = (scale, causal, sliding_window, softcap, dropout, head_offset, differentiable)
    call = _call(q, k, v, bounds, settings)
    grads = _kernel(kernel).backward(grad_out, q, k, v, out, logsumexp, saved, call)
    return *grads, q.new_empty(0) if sinks is None else sinks_gradient(grad_out, out, logsumexp, sinks)


@_attention_backward.register_fake
def _(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sinks = rest[7]  # after the output, the logsumexp, what was saved, and four boundaries
    grad_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *bounds = inputs[:10]
    ctx.save_for_backward(q, k, v, *output, *bounds)
    ctx.settings = inputs[10:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, *unused: torch.Tensor | None) -> tuple[Any, ...]:
    del unused
    assert ctx.settings[-1], "the forward was told that no backward would come"
    q, k, v, out, logsumexp, saved, *bounds = ctx.saved_tensors
    sinks = bounds[4]
    grads: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if grad_out is not None:
        grads = _attention_backward(grad_out, q, k, v, out, logsumexp, saved, *bounds, *ctx.settings)
    return *grads[:3], None, None, None, None, None if sinks is None else grads[3], *([None] * 10)


_attention.register_autograd(_differentiate, setup_context=_keep)


def _kernel(name: str) -> BlockKernel:
    from polyshard.attention.selection import kernel_named

    kernel = kernel_named(name)
    assert isinstance(kernel, BlockKernel), f"{name} has no forward and backward of its own"
    return kernel


def _call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: tuple[Any, ...], settings: tuple[Any, ...]
) -> AttentionCall:
    cu_queries, host_queries, cu_keys, host_keys, alibi_slopes, seed, sinks = bounds
    scale, causal, sliding_window, softcap, dropout, head_offset, differentiable = settings
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        scale=scale,
        causal=causal,
        sliding_window=sliding_window,
        softcap=softcap,
        dropout=dropout,
        head_offset=head_offset,
    )
    queries = PackedSequences(cu_queries, host_queries)
    keys = queries if cu_keys is None else PackedSequences(cu_keys, host_keys)
    return AttentionCall(
        spec=spec,
        queries=queries,
        keys=keys,
        alibi_slopes=alibi_slopes,
        seed=seed,
        sinks=sinks,
        save=differentiable and sinks is None,
        logsumexp=differentiable or sinks is not None,
    )
