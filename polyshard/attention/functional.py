"""`packed_attention`: trainable attention as a function."""

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
    kernel: str | None = None,
) -> torch.Tensor:
    """Attention within each of several sequences laid end to end; differentiable in q, k, v and sinks.

    Args:
        q: `[tokens, heads, head_dim]`, float32, bfloat16 or float16 (float64 on the CPU's kernels).
        k: `[key tokens, kv_heads, head_dim]`, the dtype of `q`; `kv_heads` divides `heads`.
        v: `[key tokens, kv_heads, value_dim]`.
        sequences: boundaries of the queries: `polyshard.pack(...)`, or cumulative lengths `[sequences + 1]`; default
            one sequence.
        keys: boundaries of the keys; default those of the queries. Where a sequence has more keys than queries, the
            queries are its last tokens.
        scale: factor on q·k; default `head_dim ** -0.5`.
        causal: mask keys after the query.
        sliding_window: keys `j` with `|i - j| < sliding_window` are seen.
        softcap: bound on scores, `softcap tanh(s / softcap)`.
        alibi_slopes: `slope |i - j|` is taken from scores; one for each query head.
        sinks: `[heads]`, a logit of each head that takes part in the softmax and gives nothing.
        dropout: probability of dropping a weight; drawn from a seed out of torch's CPU generator, as a function of
            head and tokens.
        kernel: force one by name; also by the environment variable POLYSHARD_ATTENTION.

    Returns:
        `[tokens, heads, value_dim]`.

    Raises:
        ConfigurationError: shapes, dtypes, devices or boundaries do not fit; no kernel has all that is asked.
    """
    _check_tensors(q, k, v, sinks)
    bounds = _bounds(sequences, q, "q")
    key_bounds = bounds if keys is None else _bounds(keys, k, "k")
    if keys is None and q.shape[0] != k.shape[0]:
        raise ConfigurationError(f"q has {q.shape[0]} tokens, k and v have {k.shape[0]}: give the keys' boundaries")
    if len(bounds.host) != len(key_bounds.host):
        raise ConfigurationError(
            f"{len(bounds.host) - 1} sequences of queries need as many of keys, got {len(key_bounds.host) - 1}"
        )
    if alibi_slopes is not None and len(alibi_slopes) != q.shape[1]:
        raise ConfigurationError(f"{q.shape[1]} heads need as many ALiBi slopes, got {len(alibi_slopes)}")
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
    )
    check_spec(spec)
    return run_kernel(q, k, v, bounds, spec, dropout > 0, kernel, sinks=sinks, keys=key_bounds)


def check_spec(spec: AttentionSpec) -> None:
    """Raise `ConfigurationError` for settings outside their range; `AttentionSpec` has checked the window."""
    if not 0.0 <= spec.dropout < 1.0:
        raise ConfigurationError(f"dropout must lie in [0, 1), got {spec.dropout}")
    if spec.softcap is not None and not spec.softcap > 0:
        raise ConfigurationError(f"softcap must be above 0, got {spec.softcap}; None for no cap")


def _bounds(sequences: PackedSequences | torch.Tensor | None, x: torch.Tensor, name: str) -> PackedSequences:
    if sequences is None:
        return batch_of(1, x.shape[0], x.device)
    if isinstance(sequences, torch.Tensor):
        return pack(sequences, x.shape[0])
    if not torch.compiler.is_compiling() and int(sequences.host[-1]) != x.shape[0]:
        raise ConfigurationError(f"the sequences hold {int(sequences.host[-1])} tokens, {name} has {x.shape[0]}")
    if sequences.cu_seqlens.device != x.device:
        raise ConfigurationError(
            f"cu_seqlens is on {sequences.cu_seqlens.device}, {name} on {x.device}: pack on that device"
        )
    return sequences


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ConfigurationError(f"q, k and v must be [tokens, heads, head_dim], got {shapes}")
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ConfigurationError(f"k and v must agree in tokens and heads, q and k in head_dim, got {shapes}")
    if 0 in (q.shape[1], k.shape[1], q.shape[2], v.shape[2]) or q.shape[1] % k.shape[1]:
        raise ConfigurationError(f"query heads must be a multiple of key-value heads, and no dimension 0, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ConfigurationError(f"q, k and v must have one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    devices = {t.device for t in (q, k, v, sinks) if t is not None}
    if len(devices) > 1:
        raise ConfigurationError(f"q, k, v and sinks must be on one device, got {', '.join(map(str, devices))}")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ConfigurationError(f"sinks must be [heads] = ({q.shape[1]},), got {tuple(sinks.shape)}")
