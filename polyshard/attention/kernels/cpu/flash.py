"""torch's flash attention operator for CPU, called for one run of sequences of equal length at a time."""

from __future__ import annotations

import torch

from polyshard.attention.kernels.cpu.tiles import Run
from polyshard.attention.kernels.protocol import AttentionCall

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports(run: Run, call: AttentionCall) -> bool:
    """Return whether the operator supports this run: its causal mask aligns the first query with the first key."""
    return run.shift == 0 or (not call.spec.causal and call.spec.sliding_window is None)


def forward_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    run: Run,
    call: AttentionCall,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> None:
    """Write a run's part of `out` and `logsumexp`."""
    queries, keys, values = _queries(q, run), _keys(k, run), _keys(v, run)
    part, total = _FORWARD(queries, keys, values, 0.0, call.spec.causal, scale=call.spec.scale)
    _queries(out, run).copy_(part)
    _queries(logsumexp, run).copy_(total)


def backward_run(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    run: Run,
    call: AttentionCall,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write a run's part of the gradients of q, k and v."""
    queries, keys, values = _queries(q, run), _keys(k, run), _keys(v, run)
    total = _queries(logsumexp, run).contiguous()
    rest = (_queries(out, run), total, 0.0, call.spec.causal)
    parts = _BACKWARD(_queries(grad_out, run), queries, keys, values, *rest, scale=call.spec.scale)
    _queries(grads[0], run).copy_(parts[0])
    _keys(grads[1], run).copy_(parts[1])
    _keys(grads[2], run).copy_(parts[2])


def _queries(packed: torch.Tensor, run: Run) -> torch.Tensor:
    """Return the queries of one run of `[tokens, heads, ...]` as a view `[count, heads, rows, ...]`."""
    return packed[run.query : run.query + run.count * run.rows].unflatten(0, (run.count, run.rows)).transpose(1, 2)


def _keys(packed: torch.Tensor, run: Run) -> torch.Tensor:
    return packed[run.key : run.key + run.count * run.keys].unflatten(0, (run.count, run.keys)).transpose(1, 2)
