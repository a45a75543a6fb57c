"""The one place where training and serving differ in a decoder: how attention reads keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, runtime_checkable

import torch

from polyshard.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What one attention layer asks of its kernel; head counts are this rank's.

    The score of query position `i` and key position `j` is `s = scale q·k`, then `softcap tanh(s / softcap)`, then
    `s - slope |i - j|`; the weights are the softmax over the keys seen and, where there are sinks, the head's sink.

    Attributes:
        num_heads: query heads on this rank.
        num_kv_heads: key and value heads on this rank; divides `num_heads`.
        head_dim: size of one query or key head.
        value_dim: size of one value head; None for `head_dim`.
        scale: factor on q·k before the softmax.
        causal: keys after the query's position are masked.
        sliding_window: keys `j` with `|i - j| < sliding_window` are seen; None for all.
        softcap: bound on scores, by tanh; None for none.
        alibi_slopes: one for each of this rank's query heads; None for no bias by distance.
        sinks: whether each head has a learned logit that takes part in the softmax and gives nothing.
        dropout: probability of dropping an attention weight in training.
        layer_index: global index of the layer, where the user gave one.
        head_offset: global index of this rank's first query head (dropout is a function of the global head).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    value_dim: int | None = None
    causal: bool = True
    sliding_window: int | None = None
    softcap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    sinks: bool = False
    dropout: float = 0.0
    layer_index: int | None = None
    head_offset: int = 0

    def __post_init__(self) -> None:
        window = self.sliding_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ConfigurationError(
                f"sliding_window is wrong: got {window!r}, expected a positive integer, or None for full attention. "
                "Correct the model's configuration."
            )

    @property
    def v_dim(self) -> int:
        """Size of one value head."""
        return self.head_dim if self.value_dim is None else self.value_dim


def without_layer(spec: AttentionSpec) -> AttentionSpec:
    """Return the request of a layer without its index: one object for all layers that ask for the same.

    torch.compile guards on the identity of the object, so that equal layers share one compiled graph.
    """
    return _interned(replace(spec, layer_index=None))


@cache
def _interned(spec: AttentionSpec) -> AttentionSpec:
    return spec


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Sequences laid end to end. Make them by `polyshard.pack` once for a step, and hand them to every layer.

    Attributes:
        cu_seqlens: int32 `[sequences + 1]`, cumulative lengths from 0 to the number of tokens, on the device.
        host: the same on the CPU (the same tensor where that is the device): a kernel reads it without waiting.
    """

    cu_seqlens: torch.Tensor
    host: torch.Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of each sequence."""
        return tuple(self.host.diff().tolist())

    @property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return int(self.host.diff().max()) if len(self.host) > 1 else 0


class AttentionCore(Protocol):
    """Attention proper: a flash kernel in training, a paged KV cache in a server."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: `[tokens, heads, head_dim]`, rotary embedding applied.
            k: `[tokens, kv_heads, head_dim]`, rotary embedding applied.
            v: `[tokens, kv_heads, value_dim]`.
            sequences: where each sequence begins; None in a server, which knows it from its own metadata.

        Returns:
            `[tokens, heads, value_dim]`.
        """
        ...


@runtime_checkable
class RotaryCore(Protocol):
    """An attention core with a rotary operator of its engine's own."""

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both rotated; may be in place.

        Args:
            q: `[tokens, heads, head_dim]`.
            k: `[tokens, kv_heads, head_dim]`.
            cos: `[tokens, 1, rotary_dim / 2]`.
            sin: the same shape.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """What multi-head latent attention adds to an `AttentionSpec`, whose `head_dim` is the first and the second sum.

    Attributes:
        nope_dim: part of a query or key head that is not rotated.
        rope_dim: part that is; the key's is shared by all heads.
        kv_rank: size of the latent from which keys and values are expanded.
        q_rank: of the queries'; None for a direct projection.
    """

    nope_dim: int
    rope_dim: int
    kv_rank: int
    q_rank: int | None


class LatentCore(Protocol):
    """Latent attention over a cache of latents, by an engine's own layer."""

    def __call__(self, q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            q: `[tokens, heads, nope_dim + rope_dim]`, its second part rotated.
            latent: `[tokens, kv_rank]`, after its norm.
            k_rope: `[tokens, 1, rope_dim]`, rotated.

        Returns:
            `[tokens, heads, value_dim]`.
        """
        ...


class LatentFactory(Protocol):
    """Makes the core of one layer of latent attention in an engine."""

    def __call__(self, spec: AttentionSpec, latent: LatentSpec, expand: torch.nn.Module) -> LatentCore:
        """The core.

        Args:
            spec: the layer, as an ordinary attention would have it.
            latent: its latents.
            expand: column-parallel `[..., kv_rank]` to `[..., heads * (nope_dim + value_dim)]`; weights come later.

        Raises:
            RegistrationError: the engine has no kernel for these sizes; the message says how to do without.
        """
        ...


class AttentionFactory(Protocol):
    """Makes the attention core of one layer of a served model."""

    def __call__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> AttentionCore:
        """The core for `spec`; `sinks` is the layer's parameter `[heads]`, loaded later.

        Raises:
            RegistrationError: the server's attention lacks a feature of `spec`.
        """
        ...
