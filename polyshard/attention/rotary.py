"""Rotary position embedding with the scalings that published models use.

Source: Su et al. 2021, "RoFormer". The pairs are (i, i + dim/2), as in transformers and vLLM ("neox" style).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError
from polyshard.native.operator import bare_operator

SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# On CPU Inductor would compute cosines and sines again for every layer that reads them: it keeps what is read more than
# once only where that takes an exponential (torch/_inductor/ir.py, should_realize_on_reuse).
_computed_once = bare_operator(
    "computed_once(Tensor x) -> Tensor", torch.clone, torch.empty_like, "CompositeExplicitAutograd"
)


def rotary_frequencies(
    dim: int, theta: float, scaling: Mapping[str, Any] | None, max_position: int
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, and the factor on cosine and sine.

    Args:
        dim: rotated part of a head; even.
        theta: base of the frequencies.
        scaling: a Hugging Face `rope_scaling` or `rope_parameters` mapping; `rope_type` (or `type`) is one of
            `SCALINGS`. None for no scaling.
        max_position: the model's `max_position_embeddings`.

    Returns:
        float32 `[dim / 2]`, and a float.

    Raises:
        ConfigurationError: an unknown scaling, or one whose parameters are missing.
    """
    if dim % 2:
        raise ConfigurationError(f"rotary embedding needs an even dimension, got {dim}")
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    inverse = 1.0 / theta**exponents
    if kind == "default":
        return inverse, 1.0
    if kind not in SCALINGS:
        raise ConfigurationError(f"unknown rotary scaling {kind!r}; known: {', '.join(SCALINGS)}")
    if kind == "longrope":
        return _longrope(exponents, theta, scaling, max_position)
    factor = float(_need(scaling, "factor", kind))
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "dynamic":
        # As transformers and vLLM serve it: the base for the longest sequence that the model is run with.
        original = float(scaling.get("original_max_position_embeddings") or max_position)
        length = max(float(max_position), original)
        base = theta * ((factor * length / original) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base**exponents, 1.0
    if kind == "llama3":
        return _llama3(inverse, scaling, factor), 1.0
    return _yarn(inverse, dim, theta, scaling, factor, max_position)


def _need(scaling: Mapping[str, Any], key: str, kind: str) -> Any:
    if scaling.get(key) is None:
        raise ConfigurationError(f"rotary scaling {kind!r} needs {key!r}; it has {sorted(scaling)}")
    return scaling[key]


def _llama3(inverse: torch.Tensor, scaling: Mapping[str, Any], factor: float) -> torch.Tensor:
    """Source: transformers, `_compute_llama3_parameters`."""
    low = float(_need(scaling, "low_freq_factor", "llama3"))
    high = float(_need(scaling, "high_freq_factor", "llama3"))
    original = float(_need(scaling, "original_max_position_embeddings", "llama3"))
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    result = torch.where(wavelength > original / low, inverse / factor, blended)
    return torch.where(wavelength < original / high, inverse, result)


def _longrope(
    exponents: torch.Tensor, theta: float, scaling: Mapping[str, Any], max_position: int
) -> tuple[torch.Tensor, float]:
    """Source: Ding et al. 2024, "LongRoPE"; transformers, `_compute_longrope_parameters`.

    The long factors are taken where the model's `max_position_embeddings` is beyond its original length, for all
    sequences: as vLLM serves it. (transformers takes the short ones for short inputs, so that a cached prefix changes
    its meaning when a sequence grows.)
    """
    original = float(_need(scaling, "original_max_position_embeddings", "longrope"))
    long = max_position > original
    given = _need(scaling, "long_factor" if long else "short_factor", "longrope")
    factors = torch.tensor(given, dtype=torch.float32, device="cpu")
    if len(factors) != len(exponents):
        raise ConfigurationError(f"rotary scaling 'longrope' needs {len(exponents)} factors, it has {len(factors)}")
    factor = float(scaling.get("factor") or max_position / original)
    magnitude = scaling.get("long_mscale" if long else "short_mscale") or scaling.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (factors * theta**exponents), float(magnitude)


def _yarn(
    inverse: torch.Tensor,
    dim: int,
    theta: float,
    scaling: Mapping[str, Any],
    factor: float,
    max_position: int,
) -> tuple[torch.Tensor, float]:
    """Source: Peng et al. 2023, "YaRN"; transformers, `_compute_yarn_parameters`."""
    original = float(scaling.get("original_max_position_embeddings") or max_position)

    def magnitude(scale: float, slope: float = 1.0) -> float:
        return 0.1 * slope * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        slope, slope_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = (
            magnitude(factor, slope) / magnitude(factor, slope_all) if slope and slope_all else magnitude(factor)
        )

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (
        dimension(float(scaling.get("beta_fast") or 32)),
        dimension(float(scaling.get("beta_slow") or 1)),
    )
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), float(attention_factor)


class RotaryEmbedding(nn.Module):
    """Cosines and sines for positions; shared by all layers of a model.

    Args:
        head_dim: size of a head.
        theta: base.
        scaling: see `rotary_frequencies`.
        max_position: the model's `max_position_embeddings`.
        rotary_dim: how much of each head is rotated; default all of it.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        max_position: int = 4096,
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim or head_dim
        self._exactly, self.factor = rotary_frequencies(self.rotary_dim, theta, scaling, max_position)
        # Not persistent: a checkpoint has no such tensor, and a server's weight reload would leave it undefined.
        self.register_buffer("inverse_frequencies", self._exactly.to(torch.get_default_device()), persistent=False)
        self.inverse_frequencies: torch.Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """Move with the model, but stay float32: `model.to(torch.bfloat16)` would round the frequencies for good."""
        super()._apply(fn, recurse)
        self.inverse_frequencies = self._exactly.to(self.inverse_frequencies.device)
        return self

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each `[*positions.shape, 1, rotary_dim / 2]`, rounded to `dtype`."""
        if self.inverse_frequencies.device != positions.device:  # made before its layers were given a device
            self.inverse_frequencies = self._exactly.to(positions.device)
        # float32 even in a model of lower precision: positions above 256 are not exact in bfloat16.
        angles = positions.unsqueeze(-1).float() * self.inverse_frequencies.float()
        cos, sin = ((f(angles) * self.factor).to(dtype).unsqueeze(-2) for f in (torch.cos, torch.sin))
        if torch.compiler.is_compiling() and cos.device.type == "cpu":
            return _computed_once(cos), _computed_once(sin)
        return cos, sin


def halves(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Heads `[..., head_dim]` whose rotated pairs are neighbours, the pairs put apart into two halves.

    Done alike to queries and keys it changes no score; so does Hugging Face to the weights, once and for all.
    """
    rotated, rest = x.split([rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    apart = rotated.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return apart if not rest.shape[-1] else torch.cat((apart, rest), dim=-1)


def rotate_heads(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rotary` of queries and keys."""
    return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads `[..., heads, head_dim]`; the arithmetic is float32 or wider, as in vLLM."""
    dim = cos.shape[-1] * 2
    rotated, rest = (x, None) if dim == x.shape[-1] else x.split([dim, x.shape[-1] - dim], dim=-1)
    wide = rotated if rotated.dtype == torch.float64 else rotated.float()
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)
