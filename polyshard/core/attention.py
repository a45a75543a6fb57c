"""Attention specs, packed sequences, and the attention cores that differ between training and serving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, runtime_checkable

import torch

from polyshard.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The features that one attention layer requests from a kernel.

    For query position `i` and key position `j` the score is `s = scale q·k`, then `softcap tanh(s / softcap)`, then
    `s - slope |i - j|`. The attention weights are the softmax over the unmasked keys and, if there are sinks, the
    head's sink.

    Attributes:
        num_heads: number of query heads on this rank.
        num_kv_heads: number of key and value heads on this rank; must divide `num_heads`.
        head_dim: size of a query or key head.
        value_dim: size of a value head; None for `head_dim`.
        scale: factor on q·k before the softmax.
        causal: mask keys after the query's position.
        sliding_window: mask keys `j` unless `|i - j| < sliding_window`; None for no window.
        softcap: bound on the scores, by tanh; None for no bound.
        alibi_slopes: one slope for each query head on this rank; None for no ALiBi.
        sinks: whether each head has a learned logit that is added to the softmax's sum and has no value.
        dropout: probability of dropping an attention weight in training.
        layer_index: global index of the layer, if the user gave one.
        head_offset: global index of this rank's first query head (dropout is a function of the global head).

    Raises:
        ConfigurationError: `sliding_window` is not a positive integer.

    Examples:
        >>> spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, scale=64**-0.5, sliding_window=4096)
        >>> spec.v_dim
        64
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
                f"sliding_window is invalid: got {window!r}, expected a positive integer, or None for full attention. "
                "Correct the model's configuration."
            )

    @property
    def v_dim(self) -> int:
        """The size of a value head."""
        return self.head_dim if self.value_dim is None else self.value_dim


def without_layer(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec of a layer without its index: the same object for all layers with equal specs.

    torch.compile guards on the identity of the object, so that equal layers share one compiled graph.
    """
    return _interned(replace(spec, layer_index=None))


@cache
def _interned(spec: AttentionSpec) -> AttentionSpec:
    return spec


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """The boundaries of sequences that are concatenated along the token dimension.

    Create them with `polyshard.pack`, once for each step, and pass them to every layer.

    Attributes:
        cu_seqlens: int32 `[sequences + 1]`: cumulative lengths from 0 to the number of tokens, on the device.
        host: the same values on the CPU, which kernels read without synchronizing the device. The same tensor if the
            device is the CPU.

    Examples:
        >>> sequences = ps.pack(torch.tensor([0, 3, 8]), tokens=8)
        >>> sequences.lengths, sequences.max_length
        ((3, 5), 5)
    """

    cu_seqlens: torch.Tensor
    host: torch.Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence."""
        return tuple(self.host.diff().tolist())

    @property
    def max_length(self) -> int:
        """The length of the longest sequence."""
        return int(self.host.diff().max()) if len(self.host) > 1 else 0


class AttentionCore(Protocol):
    """The callable of an attention module that reads keys and values.

    In training it is a kernel over packed sequences, in a server the paged KV cache.

    Examples:
        A core that forgets the past, so that every token sees only itself:

        >>> def core(q, k, v, sequences):
        ...     return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        >>> core(torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.ones(3, 2, 8), None).shape
        torch.Size([3, 4, 8])
    """

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        """Compute attention.

        Args:
            q: `[tokens, heads, head_dim]`, after the rotary embedding.
            k: `[tokens, kv_heads, head_dim]`, after the rotary embedding.
            v: `[tokens, kv_heads, value_dim]`.
            sequences: boundaries of the sequences; None in a server, which has its own metadata.

        Returns:
            `[tokens, heads, value_dim]`.
        """
        ...


@runtime_checkable
class RotaryCore(Protocol):
    """An attention core with the rotary operator of a server."""

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the rotary embedding to queries and keys, possibly in place.

        Args:
            q: `[tokens, heads, head_dim]`.
            k: `[tokens, kv_heads, head_dim]`.
            cos: `[tokens, 1, rotary_dim / 2]`.
            sin: the shape of `cos`.

        Returns:
            The rotated queries and keys, in the shapes of `q` and `k`.
        """
        ...


@runtime_checkable
class SinksCore(Protocol):
    """An attention core that holds the sinks itself."""

    def use_sinks(self, sinks: torch.Tensor) -> None:
        """Use these sinks `[heads]` from now on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """The sizes of multi-head latent attention, in addition to an `AttentionSpec` with `head_dim = nope + rope`.

    Attributes:
        nope_dim: size of the part of a query or key head without rotary embedding.
        rope_dim: size of the part with rotary embedding; the key's is shared by all heads.
        kv_rank: size of the latent from which keys and values are expanded.
        q_rank: size of the queries' latent; None for a direct projection.
    """

    nope_dim: int
    rope_dim: int
    kv_rank: int
    q_rank: int | None


class LatentCore(Protocol):
    """Multi-head latent attention over a server's cache of latents."""

    def __call__(self, q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
        """Compute attention.

        Args:
            q: `[tokens, heads, nope_dim + rope_dim]`, with the rotary embedding applied to the last `rope_dim`.
            latent: `[tokens, kv_rank]`, after its norm.
            k_rope: `[tokens, 1, rope_dim]`, after the rotary embedding.

        Returns:
            `[tokens, heads, value_dim]`.
        """
        ...


class LatentFactory(Protocol):
    """A factory of latent attention cores, one for each layer of a served model."""

    def __call__(self, spec: AttentionSpec, latent: LatentSpec, expand: torch.nn.Module) -> LatentCore:
        """Build the core of one layer.

        Args:
            spec: the layer's spec with keys and values expanded to all heads.
            latent: the sizes of the latents.
            expand: the column-parallel projection `[..., kv_rank] -> [..., heads * (nope_dim + value_dim)]`, whose
                weights are loaded later.

        Raises:
            RegistrationError: the server has no kernel for these sizes; the message names the alternative.
        """
        ...


class AttentionFactory(Protocol):
    """A factory of attention cores, one for each layer of a served model."""

    def __call__(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> AttentionCore:
        """Build the core of one layer.

        Args:
            spec: the layer's spec.
            sinks: the layer's parameter `[heads]`, whose values are loaded later; None without sinks.

        Raises:
            RegistrationError: the server's attention does not support a feature of `spec`.
        """
        ...
