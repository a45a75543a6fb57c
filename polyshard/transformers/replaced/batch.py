"""Attention of a batch in the layouts of transformers' models: padded rows, packed rows, keys from a cache."""

from __future__ import annotations

from typing import Any

import torch

from polyshard.attention.functional import packed_attention
from polyshard.attention.packing import batch_of
from polyshard.attention.positions import check_positions
from polyshard.core.errors import ConfigurationError
from polyshard.transformers.replaced.dense import allow_dense, masked_attention, warn_once, windowed_attention


def attend_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    last_counts: bool = False,
    **features: Any,
) -> torch.Tensor:
    """Compute attention of a padded batch, or of rows that hold several sequences.

    Args:
        q: `[batch, seq, heads, head_dim]`.
        k: `[batch, keys, kv_heads, head_dim]`; if there are more keys than queries, the queries are the last tokens.
        v: same shape as `k`.
        mask: `[batch, keys]`, True for tokens that count; or `[batch or 1, heads or 1, seq, keys]`, True for visible
            keys or a float that is added to scores, which replaces causality and window; None if all tokens count.
        cu_seqlens: boundaries in the flattened batch; None for one sequence in each row.
        last_counts: also compute the last query of a row if it is masked.
        features: keyword arguments of `packed_attention`.

    Returns:
        `[batch, seq, heads, head_dim]`; masked queries may be 0.

    Raises:
        ConfigurationError: the mask has another shape, or boundaries are combined with a mask or a cache.
    """
    batch, length, keys = q.shape[0], q.shape[1], k.shape[1]
    if cu_seqlens is not None and (mask is not None or keys != length):
        beside = "an attention mask" if mask is not None else f"{keys - length} cached tokens"
        raise ConfigurationError(
            f"boundaries of packed sequences cannot be combined with {beside}: got both, expected one of them. Remove "
            "masked tokens from the row instead of passing a mask, and put sequences that continue into separate rows."
        )
    if mask is None:
        bounds = batch_of(batch, length, q.device) if cu_seqlens is None else cu_seqlens
        key_bounds = None if keys == length else batch_of(batch, keys, q.device)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        return packed_attention(q, k, v, bounds, keys=key_bounds, **features).unflatten(0, (batch, length))
    if mask.dim() == 4:
        kernel = features.pop("kernel", None)
        allow_dense(kernel, "a mask for every pair of query and key")
        named = {name: features[name] for name in ("scale", "softcap", "sinks", "dropout") if name in features}
        return masked_attention(q, k, v, mask, **named)
    if mask.dim() != 2 or mask.shape != (batch, keys):
        raise ConfigurationError(
            f"the attention mask has the wrong shape: got {tuple(mask.shape)}, expected [batch, keys] = {(batch, keys)}"
            ". Pass one entry for each token of the cache and the call."
        )
    counts = mask.bool()
    rows = counts[:, keys - length :]
    window = features.get("sliding_window")
    if window is not None and _gaps_matter(counts, window):
        kernel = features.pop("kernel", None)
        allow_dense(kernel, "a mask with gaps in rows longer than the sliding window")
        named = {name: value for name, value in features.items() if name not in ("sliding_window", "head_offset")}
        if last_counts:
            _tell_of_empty_windows(counts, counts[:, -window:])
        return windowed_attention(q, k, v, counts, window, named.pop("causal", True), **named)
    bounds, key_bounds = (torch.cat((t.new_zeros(1, dtype=torch.int64), t.sum(1).cumsum(0))) for t in (rows, counts))
    out = packed_attention(q[rows], k[counts], v[counts], bounds, keys=key_bounds, **features)
    out = q.new_zeros((*q.shape[:3], v.shape[-1])).masked_scatter(rows[..., None, None], out)
    return _with_last(out, q, k, v, counts, features) if last_counts else out


def _with_last(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    features: dict[str, Any],
) -> torch.Tensor:
    """Also compute the last query of rows whose last token is masked; `generate` needs it after right padding."""
    window = features.get("sliding_window")
    seen = counts.clone()
    if window is not None:
        seen[:, : max(0, seen.shape[1] - window)] = False
    _tell_of_empty_windows(counts, seen)
    which = ~counts[:, -1] & seen.any(1)
    if not bool(which.any()):
        return out
    seen &= which[:, None]
    bounds, key_bounds = (
        torch.cat((t.new_zeros(1, dtype=torch.int64), t.cumsum(0)))
        for t in (which[which].to(torch.int64), seen[which].sum(1))
    )
    features = features | {"sliding_window": None}
    last = packed_attention(q[which, -1], k[seen], v[seen], bounds, keys=key_bounds, **features)
    where = torch.zeros_like(out[..., :1, :1], dtype=torch.bool)
    where[which, -1] = True
    return out.masked_scatter(where, last)


def _gaps_matter(counts: torch.Tensor, window: int) -> bool:
    """Return whether some row is longer than the window and has masked tokens between others."""
    columns = torch.arange(counts.shape[1], device=counts.device)
    first = torch.where(counts, columns, counts.shape[1]).amin(1)
    span = torch.where(counts, columns, -1).amax(1) - first + 1
    return bool(((span > counts.sum(1)) & (span > window)).any())


def _tell_of_empty_windows(counts: torch.Tensor, seen: torch.Tensor) -> None:
    if not torch.is_grad_enabled() and bool((counts.any(1) & ~seen.any(1)).any()):
        warn_once(
            "a row ends with more masked tokens than the sliding window holds: the last query sees no key, and "
            "transformers' implementations differ in its output. Pad prompts on the left before generating."
        )


def used_mask(mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """Return a mask for the filled slots of a cache, or None if all tokens count.

    Args:
        mask: `[batch, slots]` or `[batch or 1, heads or 1, seq, slots]`.
        keys: number of filled slots.
    """
    if mask is None:
        return None
    mask = mask[..., :keys]
    return None if mask.dim() == 2 and mask.shape[1] == keys and bool(mask.all()) else mask


def given_boundaries(
    cu_seqlens: torch.Tensor,
    key_bounds: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    batch: int,
    window: int | None,
) -> torch.Tensor:
    """Check the boundaries that the caller passes.

    Args:
        cu_seqlens: boundaries of the queries in the flattened batch.
        key_bounds: boundaries of the keys; None if they are equal.
        position_ids: as in `packed_boundaries`.
        batch: number of rows.
        window: sliding window of the layer.

    Returns:
        `cu_seqlens`.

    Raises:
        ConfigurationError: keys have other boundaries, or positions skip tokens that a window would count.
    """
    if key_bounds is not None and key_bounds is not cu_seqlens and not torch.equal(key_bounds, cu_seqlens):
        raise ConfigurationError(
            f"cu_seq_lens_k is unsupported: got {key_bounds.tolist()}, expected cu_seq_lens_q, {cu_seqlens.tolist()}. "
            "Omit it."
        )
    if window is not None and position_ids is not None and position_ids.dim() == 2:
        check_positions(position_ids.expand(batch, -1).reshape(-1), cu_seqlens, window)
    return cu_seqlens


def packed_boundaries(
    position_ids: torch.Tensor | None, batch: int, length: int, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the boundaries of packed sequences; a new sequence starts where positions do not increase.

    Args:
        position_ids: `[batch or 1, seq]`; other shapes carry no information about sequences.
        batch: number of rows.
        length: number of queries in each row.
        mask: None, or as in `attend_batch`.

    Returns:
        Cumulative lengths over the flattened batch; None if each row is one sequence.

    Raises:
        ConfigurationError: positions skip a number, or restart in a row with masked tokens.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length or length < 2:
        return None
    if mask is not None and mask.dim() != 2:
        return None  # a dense mask already separates sequences
    if position_ids.is_meta:
        return None  # in a plan each row is one sequence
    position_ids = position_ids.expand(batch, -1)
    if mask is None and torch.compiler.is_compiling():
        return _boundaries(position_ids)
    steps = position_ids.diff(dim=1)
    if bool((steps == 1).all()):
        return None
    if mask is not None:
        for row, kept in zip(position_ids, mask[:, -length:].bool()):
            if bool((row[kept].diff() <= 0).any()):
                raise ConfigurationError(
                    "a packed row cannot have an attention mask: got position IDs that restart between unmasked tokens "
                    "and masked tokens, expected one of them. Remove the mask and the padding."
                )
        return None
    if bool((steps > 1).any()):
        row, at = (steps > 1).nonzero()[0].tolist()
        before, after = position_ids[row, at : at + 2].tolist()
        raise ConfigurationError(
            f"position IDs are not consecutive: got {before} and then {after}, expected {before + 1}, or at most "
            f"{before} at the start of another sequence. Pass the boundaries of sequences as cu_seq_lens_q."
        )
    starts = torch.nn.functional.pad(steps <= 0, (1, 0), value=True)
    flat = starts.flatten().nonzero().flatten()
    return torch.cat((flat, flat.new_tensor([starts.numel()])))


@torch.library.custom_op("polyshard::boundaries_of_positions", mutates_args=())
def _boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """Return boundaries, also if each row is one sequence; an operator, since torch.compile cannot branch on values."""
    rows, length = position_ids.shape
    bounds = packed_boundaries(position_ids, rows, length, None)
    return torch.arange(rows + 1, device=position_ids.device) * length if bounds is None else bounds


@_boundaries.register_fake
def _(position_ids: torch.Tensor) -> torch.Tensor:
    return position_ids.new_empty(torch.library.get_ctx().new_dynamic_size(min=2), dtype=torch.int64)
