"""What an attention layer computes with besides its weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from polyshard.core.attention import AttentionSpec
from polyshard.core.computation import describe


def describe_attention(
    module: nn.Module,
    spec: AttentionSpec,
    num_heads: int,
    num_kv_heads: int,
    alibi_slopes: Sequence[float] | None,
    interleaved: bool,
    rotary: object,
) -> None:
    """Describe an attention layer by the settings of its spec, and by its numbers for all tensor-parallel ranks.

    The frequencies of the layer's rotary embedding are read when models are compared; `rotary` is None without one.
    """
    describe(
        module,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=spec.head_dim,
        value_dim=spec.v_dim,
        scale=spec.scale,
        causal=spec.causal,
        sliding_window=spec.sliding_window,
        softcap=spec.softcap,
        alibi_slopes=None if alibi_slopes is None else [float(slope) for slope in alibi_slopes],
        interleaved=interleaved,
        has_rotary=rotary is not None,
    )
