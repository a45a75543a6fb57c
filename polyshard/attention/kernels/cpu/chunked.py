"""Attention in tiles of queries: batched matmuls with an explicit backward pass. Supports every feature.

Runs on any device and float dtype. Grouped-query heads are folded into rows, so that keys and values are never
repeated. Consecutive sequences of equal length are computed together. Tiles end at the diagonal, so that a causal mask
saves work. Matmuls whose results nearly cancel (scores, and the gradient of the weights) use and return float32.

The backward pass recomputes the attention weights from the logsumexp, so that memory is linear in the length. For short
sequences the forward pass saves them, which takes no more memory than the queries and the output.

Measured with benchmarks/attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from polyshard.attention.kernels.cpu.dropout import kept
from polyshard.attention.kernels.cpu.tiles import Run, Tile, every_row_sees, groups, tile_mask, tiles
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.attention.kernels.softmax import wide
from polyshard.core.attention import AttentionSpec

_BUDGET = 96 * 1024  # scores in one tile: 384 KiB in float32, which fits into a core's cache
_CUDA_BUDGET = 64 * 1024 * 1024


def saved_elements(run: Run, call: AttentionCall, q: torch.Tensor) -> int:
    """Return the number of attention weights of a run that are saved for its backward pass."""
    if not _keeps(run, call):
        return 0
    seen = sum((t.last - t.first) * (t.high - t.low) for t, *_ in _tiles(run, call.spec, q))
    return run.count * call.spec.num_heads * seen


def forward_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    run: Run,
    call: AttentionCall,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    saved: torch.Tensor,
) -> None:
    """Write a run's part of `out`, `logsumexp`, and `saved [saved_elements]`."""
    spec, sums_in, narrow, keeps = call.spec, wide(q.dtype), _narrow(q), _keeps(run, call)
    wanted = call.logsumexp and not keeps
    place = 0
    for group in _groups(run, spec, q):
        queries, keys, values = _rows(q, group, spec, sums_in), _keys(k, group, sums_in), _keys(v, group, narrow)
        queries = queries * spec.scale
        outs, sums = _fold(out, group, spec), _fold(logsumexp.unsqueeze(-1), group, spec)
        for tile, rows, seen in _tiles(group, spec, q):
            scores, _ = _scores(queries[:, rows], keys[:, seen], group, tile, call)
            weights, total = _softmax(scores, wanted, every_row_sees(group, tile, spec))
            if keeps:
                saved[place : place + weights.numel()].view(weights.shape).copy_(weights)
                place += weights.numel()
            if spec.dropout:
                weights.mul_(_factors(weights, group, tile, call))
            part = torch.bmm(weights.to(narrow), values[:, seen])
            outs[:, :, tile.first : tile.last].copy_(_unfold(part, group, spec))
            if total is not None:
                sums[:, :, tile.first : tile.last].copy_(_unfold(total, group, spec))


def add_logsumexp(q: torch.Tensor, k: torch.Tensor, run: Run, call: AttentionCall, logsumexp: torch.Tensor) -> None:
    """Write a run's part of `logsumexp`, for a kernel that does not return it."""
    spec, sums_in = call.spec, wide(q.dtype)
    for group in _groups(run, spec, q) if run.keys else ():
        queries, keys = _rows(q, group, spec, sums_in) * spec.scale, _keys(k, group, sums_in)
        sums = _fold(logsumexp.unsqueeze(-1), group, spec)
        for tile, rows, seen in _tiles(group, spec, q):
            scores, _ = _scores(queries[:, rows], keys[:, seen], group, tile, call)
            total = scores.logsumexp(-1, keepdim=True)
            sums[:, :, tile.first : tile.last].copy_(_unfold(total, group, spec))


def backward_run(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    saved: torch.Tensor,
    run: Run,
    call: AttentionCall,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write a run's part of the gradients of q, k and v."""
    spec, sums_in, narrow, keeps = call.spec, wide(q.dtype), _narrow(q), _keeps(run, call)
    place = 0
    for group in _groups(run, spec, q):
        queries, keys, values = _rows(q, group, spec, sums_in), _keys(k, group, sums_in), _keys(v, group, sums_in)
        grad_rows = _rows(grad_out, group, spec, sums_in)
        # rowsum(dO ∘ O) = rowsum(dP ∘ P), with dropout too (FlashAttention, appendix B)
        delta = (grad_rows * _rows(out, group, spec, sums_in)).sum(-1, keepdim=True)
        totals = _rows(logsumexp.unsqueeze(-1), group, spec, sums_in)
        small_q, small_k, small_grads = (t.to(narrow) for t in (queries, keys, grad_rows))
        queries = queries * spec.scale
        sum_k, sum_v, grad_q = torch.zeros_like(keys), torch.zeros_like(values), _fold(grads[0], group, spec)
        for tile, rows, seen in _tiles(group, spec, q):
            slope = None
            if keeps:
                shape = (queries.shape[0], rows.stop - rows.start, tile.high - tile.low)
                count = math.prod(shape)
                weights = saved[place : place + count].view(shape)
                place += count
            else:
                scores, slope = _scores(queries[:, rows], keys[:, seen], group, tile, call)
                weights = _weights(scores, totals[:, rows])
            grad_weights = _matmul(grad_rows[:, rows], values[:, seen])
            dropped = weights
            if spec.dropout:
                factors = _factors(weights, group, tile, call)
                dropped = weights * factors
                grad_weights.mul_(factors)
            _add_matmul(sum_v[:, seen], dropped.to(narrow), small_grads[:, rows])
            grad_scores = grad_weights.sub_(delta[:, rows]).mul_(weights)
            if slope is not None:
                grad_scores.mul_(slope)
            small = grad_scores.to(narrow)
            part = torch.bmm(small, small_k[:, seen]).mul_(spec.scale)
            grad_q[:, :, tile.first : tile.last].copy_(_unfold(part, group, spec))
            _add_matmul(sum_k[:, seen], small, small_q[:, rows])
        _put_keys(grads[1], sum_k.mul_(spec.scale), group)
        _put_keys(grads[2], sum_v, group)


def _narrow(q: torch.Tensor) -> torch.dtype:
    """Return the dtype of matmuls: on CPU float16 is at least ten times slower than float32."""
    return torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype


def _tile_rows(q: torch.Tensor, run: Run) -> int:
    """Return the number of queries in a tile. Fewer skip more of a causal mask; more make matmuls efficient."""
    if q.device.type != "cpu":
        return 256
    return 32 if run.keys <= 512 else 64


def _keeps(run: Run, call: AttentionCall) -> bool:
    """Return whether weights are saved for the backward pass: on average a query sees half of its sequence's keys."""
    spec = call.spec
    plain = not spec.dropout and spec.softcap is None and run.shift >= 0
    return call.save and plain and run.keys <= 4 * spec.head_dim


def _groups(run: Run, spec: AttentionSpec, q: torch.Tensor) -> Iterator[Run]:
    rows = min(_tile_rows(q, run), run.rows)
    budget = _BUDGET if q.device.type == "cpu" else _CUDA_BUDGET
    return groups(run, spec.num_heads * rows * run.keys, budget)


def _tiles(run: Run, spec: AttentionSpec, q: torch.Tensor) -> Iterator[tuple[Tile, slice, slice]]:
    """Yield each tile that sees keys, with slices of its rows `(query, head of the group)` and of its keys."""
    shared = spec.num_heads // spec.num_kv_heads
    for tile in tiles(run, spec, _tile_rows(q, run)):
        if tile.low < tile.high:
            yield tile, slice(tile.first * shared, tile.last * shared), slice(tile.low, tile.high)


def _fold(x: torch.Tensor, run: Run, spec: AttentionSpec) -> torch.Tensor:
    """Return a run's queries of `[tokens, heads, dim]` as a view `[count, kv_heads, rows, group, dim]`."""
    part = x[run.query : run.query + run.count * run.rows]
    return part.unflatten(0, (run.count, run.rows)).unflatten(2, (spec.num_kv_heads, -1)).transpose(1, 2)


def _rows(x: torch.Tensor, run: Run, spec: AttentionSpec, dtype: torch.dtype) -> torch.Tensor:
    """Return a run's queries as matrices `[count * kv_heads, rows * group, dim]`."""
    return _fold(x, run, spec).to(dtype).flatten(2, 3).flatten(0, 1)


def _unfold(x: torch.Tensor, run: Run, spec: AttentionSpec) -> torch.Tensor:
    """Reshape `[count * kv_heads, tile * group, dim]` to `[count, kv_heads, tile, group, dim]`."""
    group = spec.num_heads // spec.num_kv_heads
    return x.view(run.count, spec.num_kv_heads, -1, group, x.shape[-1])


def _keys(x: torch.Tensor, run: Run, dtype: torch.dtype) -> torch.Tensor:
    """Return a run's keys of `[tokens, kv_heads, dim]` as matrices `[count * kv_heads, keys, dim]`."""
    part = x[run.key : run.key + run.count * run.keys].unflatten(0, (run.count, run.keys))
    return part.transpose(1, 2).to(dtype).flatten(0, 1).contiguous()


def _put_keys(total: torch.Tensor, part: torch.Tensor, run: Run) -> None:
    """Write matrices of a run's keys back into `[tokens, kv_heads, dim]`, the inverse of `_keys`."""
    place = total[run.key : run.key + run.count * run.keys].unflatten(0, (run.count, run.keys))
    place.transpose(1, 2).copy_(part.unflatten(0, (run.count, -1)))


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a bᵀ`."""
    return torch.bmm(a, b.transpose(1, 2))


def _add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Compute `total += aᵀ b` in place."""
    if total.dtype == a.dtype:
        total.baddbmm_(a.transpose(1, 2), b)
    else:
        total.add_(torch.bmm(a.transpose(1, 2), b))


def _scores(
    q: torch.Tensor, k: torch.Tensor, run: Run, tile: Tile, call: AttentionCall
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scores `[count * kv_heads, tile * group, keys]`, and the softcap's derivative or None; `q` is scaled."""
    spec, slope = call.spec, None
    scores = _matmul(q, k)
    if spec.softcap is not None:
        bounded = scores.div_(spec.softcap).tanh_()
        slope = 1 - bounded * bounded
        scores = bounded.mul_(spec.softcap)
    view = _unfold(scores, run, spec)
    if call.alibi_slopes is not None:
        apart = torch.arange(tile.first, tile.last, device=q.device)[:, None, None] + run.shift
        apart = (apart - torch.arange(tile.low, tile.high, device=q.device)).abs()
        slopes = call.alibi_slopes.view(spec.num_kv_heads, 1, -1, 1)
        view.sub_(slopes.to(scores.dtype) * apart)
    mask, column = tile_mask(run, tile, spec, scores)
    if mask is not None:
        view[..., column:].add_(mask)
    return scores, slope


def _softmax(scores: torch.Tensor, wanted: bool, every_row_sees: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights, and the logsumexp `[..., 1]` if it is wanted, else None."""
    if not every_row_sees:
        total = scores.logsumexp(-1, keepdim=True)
        return _weights(scores, total), total
    weights = torch.softmax(scores, -1)
    if not wanted:
        return weights, None
    # The largest weight is exp(largest score - logsumexp), which saves another pass of exponentials.
    return weights, scores.amax(-1, keepdim=True).sub_(weights.amax(-1, keepdim=True).log_())


def _weights(scores: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return `exp(scores - total)`, and 0 for a query that sees no key. Overwrites `scores`."""
    return scores.sub_(total.clamp_min(torch.finfo(total.dtype).min)).exp_()


def _factors(weights: torch.Tensor, run: Run, tile: Tile, call: AttentionCall) -> torch.Tensor:
    """Return dropout's factors, 0 or 1 / (1 - p), in the shape of `weights`."""
    spec, device = call.spec, weights.device
    assert call.seed is not None
    heads = torch.arange(spec.num_heads, device=device).view(spec.num_kv_heads, 1, -1, 1) + spec.head_offset
    sequence = torch.arange(run.count, device=device).view(-1, 1, 1, 1, 1)
    rows = torch.arange(tile.first, tile.last, device=device).view(-1, 1, 1)
    columns = torch.arange(tile.low, tile.high, device=device)
    queries = run.query_id + sequence * run.rows + rows
    keep = kept(call.seed, spec.dropout, heads, queries, run.key_id + sequence * run.keys + columns)
    return keep.to(weights.dtype).div_(1.0 - spec.dropout).view(weights.shape)
