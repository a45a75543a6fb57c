"""`packed_attention`: differentiable attention of packed sequences as a function."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyshard.attention.kernel_call import run_kernel
from polyshard.attention.packing import batch_of, pack
from polyshard.core.attention import AttentionSpec, PackedSequences
from polyshard.core.errors import ConfigurationError


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: PackedSequences | torch.Tensor | None = None,
    *,
    keys: PackedSequences | torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Sequence[float] | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
    head_offset: int = 0,
    kernel: str | None = None,
) -> torch.Tensor:
    """Compute attention within each packed sequence. Differentiable in `q`, `k`, `v` and `sinks`.

    Args:
        q: `[tokens, heads, head_dim]`, float32, bfloat16 or float16 (also float64 with the CPU kernels).
        k: `[key tokens, kv_heads, head_dim]`, in the dtype of `q`; `kv_heads` must divide `heads`.
        v: `[key tokens, kv_heads, value_dim]`.
        sequences: boundaries of the queries: `polyshard.pack(...)`, or cumulative lengths `[sequences + 1]`; default:
            one sequence.
        keys: boundaries of the keys; default: those of the queries. If a sequence has more keys than queries, the
            queries are its last tokens.
        scale: factor on q·k; default: `head_dim ** -0.5`.
        causal: mask keys after the query.
        sliding_window: mask keys `j` unless `|i - j| < sliding_window`.
        softcap: bound on the scores, `softcap tanh(s / softcap)`.
        alibi_slopes: one slope for each query head; `slope |i - j|` is subtracted from the scores.
        sinks: `[heads]`, one logit for each head that is added to the softmax's sum and has no value.
        dropout: probability of dropping an attention weight. The mask is a function of a seed from torch's CPU
            generator, the head, and the two tokens.
        head_offset: index of the first head of `q` among the heads of all tensor-parallel ranks, for dropout.
        kernel: name of the kernel to use; default: the environment variable POLYSHARD_ATTENTION, else the fastest one.

    Returns:
        `[tokens, heads, value_dim]`.

    Raises:
        ConfigurationError: shapes, dtypes, devices or boundaries are invalid, or no kernel supports the request.

    Examples:
        >>> q, k, v = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 16)
        >>> out = packed_attention(q, k, v, ps.pack(torch.tensor([0, 3, 7]), tokens=7))
        >>> out.shape
        torch.Size([7, 4, 16])
        >>> torch.allclose(out[3:], packed_attention(q[3:], k[3:], v[3:]), atol=1e-6)  # the second sequence alone
        True
    """
    _check_tensors(q, k, v, sinks)
    bounds = _bounds(sequences, q, "q")
    key_bounds = bounds if keys is None else _bounds(keys, k, "k")
    if keys is None and q.shape[0] != k.shape[0]:
        raise ConfigurationError(
            f"The number of keys is wrong: got {q.shape[0]} tokens in q and {k.shape[0]} in k and v, expected equal "
            "numbers. Pass the boundaries of the keys with keys."
        )
    if len(bounds.host) != len(key_bounds.host):
        raise ConfigurationError(
            f"The number of key sequences is wrong: got {len(key_bounds.host) - 1}, expected {len(bounds.host) - 1}, "
            "the number of query sequences."
        )
    if alibi_slopes is not None and len(alibi_slopes) != q.shape[1]:
        raise ConfigurationError(
            f"The number of ALiBi slopes is wrong: got {len(alibi_slopes)}, expected one for each of {q.shape[1]} "
            "query heads."
        )
    spec = AttentionSpec(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        scale=q.shape[2] ** -0.5 if scale is None else scale,
        causal=causal,
        sliding_window=sliding_window,
        softcap=softcap,
        alibi_slopes=None if alibi_slopes is None else tuple(alibi_slopes),
        sinks=sinks is not None,
        dropout=dropout,
        head_offset=head_offset,
    )
    check_spec(spec)
    return run_kernel(q, k, v, bounds, spec, dropout > 0, kernel, sinks=sinks, keys=key_bounds)


def check_spec(spec: AttentionSpec) -> None:
    """Raise `ConfigurationError` if dropout or softcap is out of range; `AttentionSpec` checks the sliding window."""
    if not 0.0 <= spec.dropout < 1.0:
        raise ConfigurationError(f"dropout is out of range: got {spec.dropout}, expected a number in [0, 1).")
    if spec.softcap is not None and not spec.softcap > 0:
        raise ConfigurationError(f"softcap is out of range: got {spec.softcap}, expected a positive number or None.")


def _bounds(sequences: PackedSequences | torch.Tensor | None, x: torch.Tensor, name: str) -> PackedSequences:
    if sequences is None:
        return batch_of(1, x.shape[0], x.device)
    if isinstance(sequences, torch.Tensor):
        return pack(sequences, x.shape[0])
    if not torch.compiler.is_compiling() and int(sequences.host[-1]) != x.shape[0]:
        raise ConfigurationError(
            f"The boundaries do not match {name}: got {int(sequences.host[-1])} tokens in the sequences, expected the "
            f"{x.shape[0]} of {name}."
        )
    if sequences.cu_seqlens.device != x.device:
        raise ConfigurationError(
            f"cu_seqlens is on the wrong device: got {sequences.cu_seqlens.device}, expected {x.device} as for {name}. "
            "Call pack with a tensor on that device."
        )
    return sequences


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ConfigurationError(f"q, k or v has the wrong shape: got {shapes}, expected [tokens, heads, head_dim].")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ConfigurationError(
            f"The shapes of q, k and v do not match: got {shapes}, expected equal tokens and heads of k and v, and "
            "equal head_dim of q and k."
        )
    if 0 in (q.shape[1], k.shape[1], q.shape[2], v.shape[2]) or q.shape[1] % k.shape[1]:
        raise ConfigurationError(
            f"The heads of q, k or v are invalid: got {shapes}, expected query heads that are a multiple of the KV "
            "heads, and no empty dimension."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ConfigurationError(
            f"The dtypes of q, k and v are unsupported: got {q.dtype}, {k.dtype} and {v.dtype}, expected one float "
            "dtype for all."
        )
    devices = {t.device for t in (q, k, v, sinks) if t is not None}
    if len(devices) > 1:
        raise ConfigurationError(
            f"q, k, v and sinks are on different devices: got {', '.join(map(str, devices))}, expected one device."
        )
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ConfigurationError(
            f"sinks has the wrong shape: got {tuple(sinks.shape)}, expected [heads] = ({q.shape[1]},)."
        )
