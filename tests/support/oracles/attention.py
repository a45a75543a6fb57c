"""Reference attention in float64, sequence by sequence. Every kernel is compared with it."""

import math

import torch


def attention(
    q, k, v, lengths, key_lengths=None, *, scale=None, causal=True, window=None, softcap=None, slopes=None, sinks=None
):
    """`[tokens, heads, value_dim]`, in the dtype of its inputs; queries are the last tokens of their keys."""
    outs, start, key_start = [], 0, 0
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for length, key_length in zip(lengths, key_lengths or lengths):
        part, key_part = slice(start, start + length), slice(key_start, key_start + key_length)
        keys, values = (t[key_part].repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = q[part].transpose(0, 1) @ keys.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(length)[:, None] + key_length - length
        apart = i - torch.arange(key_length)[None]
        if slopes is not None:
            scores = scores - torch.tensor(slopes, dtype=scores.dtype)[:, None, None] * apart.abs()
        hidden = apart < 0 if causal else torch.zeros_like(apart, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (apart.abs() >= window)
        scores = scores.masked_fill(hidden, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(-1, length, 1)), dim=-1)
        # A query that sees nothing gives nothing.
        top = scores.amax(-1, keepdim=True).clamp_min(-1e30) if scores.shape[-1] else scores.new_zeros(())
        weights = (scores - top).exp()
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
        outs.append((weights[..., :key_length] @ values).transpose(0, 1))
        start += length
        key_start += key_length
    return torch.cat(outs) if outs else q.new_zeros((0, q.shape[1], v.shape[2]))
