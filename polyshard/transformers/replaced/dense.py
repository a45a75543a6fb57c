"""Attention with a dense mask, in plain torch, for patterns that no flash kernel supports."""

from __future__ import annotations

import logging

import torch

from polyshard.attention.kernels.softmax import wide
from polyshard.core.errors import ConfigurationError

logger = logging.getLogger(__name__)

_BLOCK = 256  # queries of a windowed row that are computed together
_told: set[str] = set()


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return attention in which only the mask determines the keys that a query sees.

    Args:
        q: `[batch, queries, heads, head_dim]`.
        k: `[batch, keys, kv_heads, head_dim]`.
        v: `[batch, keys, kv_heads, value_dim]`.
        mask: `[batch or 1, heads or 1, queries, keys]`: True for visible keys, or a float that is added to scores.
        scale: factor on q·k; `head_dim ** -0.5` by default.
        softcap: bound on scores.
        sinks: `[heads]`, a logit of each head that takes part in the softmax without a value.
        dropout: probability of dropping a weight.

    Returns:
        `[batch, queries, heads, value_dim]`; 0 for queries that see no key.

    Raises:
        ConfigurationError: the mask has another shape.
    """
    batch, length, heads, dim = q.shape
    keys, groups = k.shape[1], k.shape[2]
    rows = (batch, heads, length, keys)
    if (
        mask.dim() != 4
        or any(got not in (1, want) for got, want in zip(mask.shape[:2], rows))
        or mask.shape[2:] != rows[2:]
    ):
        raise ConfigurationError(
            f"the attention mask has the wrong shape: got {tuple(mask.shape)}, expected [batch or 1, heads or 1, "
            f"queries, keys] of {rows}. Pass a mask for this rank's heads and all keys of the cache."
        )
    kind = wide(q.dtype)
    grouped = q.to(kind).unflatten(2, (groups, heads // groups))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.to(kind)).flatten(1, 2)
    scores = scores * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(kind)
    largest = scores.amax(-1, keepdim=True)
    logits = None if sinks is None else sinks.to(kind)[:, None, None]
    if logits is not None:
        largest = torch.maximum(largest, logits)
    largest = largest.detach().clamp_min(torch.finfo(kind).min)  # not -inf if a query sees no key
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if logits is not None:
        total = total + (logits - largest).exp()
    weights = weights / total.clamp_min(torch.finfo(kind).tiny)
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights.unflatten(1, (groups, -1)), v.to(kind))
    return out.flatten(2, 3).to(q.dtype)


def windowed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    window: int,
    causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return attention in a window that also counts masked tokens.

    Args:
        q: `[batch, queries, heads, head_dim]`, the last tokens of the keys.
        k: `[batch, keys, kv_heads, head_dim]`.
        v: `[batch, keys, kv_heads, value_dim]`.
        counts: bool `[batch, keys]`, True for visible keys.
        window: keys `j` with `|i - j| < window` are visible.
        causal: keys after the query are not visible.
        scale: as in `masked_attention`.
        softcap: as in `masked_attention`.
        sinks: as in `masked_attention`.
        dropout: as in `masked_attention`.

    Returns:
        `[batch, queries, heads, value_dim]`.
    """
    keys, length, offset = k.shape[1], q.shape[1], k.shape[1] - q.shape[1]
    parts = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        low = max(0, offset + start - window + 1)
        high = offset + end if causal else min(keys, offset + end + window)
        apart = torch.arange(offset + start, offset + end, device=q.device)[:, None]
        apart = apart - torch.arange(low, high, device=q.device)
        near = (apart < window) & (apart >= 0 if causal else apart > -window)
        mask = near & counts[:, None, None, low:high]
        features = {"scale": scale, "softcap": softcap, "sinks": sinks, "dropout": dropout}
        parts.append(masked_attention(q[:, start:end], k[:, low:high], v[:, low:high], mask, **features))
    return torch.cat(parts, dim=1)


def allow_dense(kernel: str | None, reason: str) -> None:
    """Warn once that attention is computed in plain torch; reject it if a kernel is prescribed.

    Raises:
        ConfigurationError: a kernel was named, by the caller or by exact mode.
    """
    if kernel is not None:
        raise ConfigurationError(
            f"the attention mask is not supported by kernel {kernel!r}: got {reason}, expected one entry for each "
            "token without gaps. Remove kernel=, or change the mask."
        )
    warn_once(f"attention runs without a flash kernel and takes memory for queries times keys, because of {reason}")


def warn_once(message: str) -> None:
    """Log a warning, once in each process."""
    if message not in _told:
        _told.add(message)
        logger.warning(message)
