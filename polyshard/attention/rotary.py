"""Rotary position embedding with the scalings of published models.

Source: Su et al. 2021, "RoFormer". The rotated pairs are (i, i + dim/2), as in transformers and vLLM ("neox" style).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from polyshard.core.errors import ConfigurationError
from polyshard.native import rotary as native
from polyshard.native.custom_operator import bare_operator

SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# On CPU Inductor would recompute cosines and sines in every layer that reads them: of values with several readers it
# stores only those with an exponential (torch/_inductor/ir.py, should_realize_on_reuse).
_computed_once = bare_operator(
    "computed_once(Tensor x) -> Tensor", torch.clone, torch.empty_like, "CompositeExplicitAutograd"
)


def rotary_frequencies(
    dim: int, theta: float, scaling: Mapping[str, Any] | None, max_position: int
) -> tuple[torch.Tensor, float]:
    """Return the inverse frequencies, and the factor on cosine and sine.

    Args:
        dim: size of the rotated part of a head; must be even.
        theta: base of the frequencies.
        scaling: a Hugging Face `rope_scaling` or `rope_parameters` mapping, whose `rope_type` (or `type`) is one of
            `SCALINGS`; None for no scaling.
        max_position: the model's `max_position_embeddings`.

    Returns:
        float32 `[dim / 2]` on the CPU, and a float.

    Raises:
        ConfigurationError: the dimension is odd, the scaling is unknown, or one of its parameters is missing.

    Examples:
        >>> rotary_frequencies(4, 10000.0, {"rope_type": "linear", "factor": 2.0}, 4096)
        (tensor([0.5000, 0.0050]), 1.0)
    """
    if dim % 2:
        raise ConfigurationError(f"The rotary dimension is invalid: got {dim}, expected an even number.")
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    inverse = 1.0 / theta**exponents
    if kind == "default":
        return inverse, 1.0
    if kind not in SCALINGS:
        raise ConfigurationError(f"The rotary scaling is unknown: got {kind!r}, expected one of {', '.join(SCALINGS)}.")
    if kind == "longrope":
        return _longrope(exponents, theta, scaling, max_position)
    factor = float(_need(scaling, "factor", kind))
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "dynamic":
        # As in transformers and vLLM: the base for the longest sequence that the model supports.
        original = float(scaling.get("original_max_position_embeddings") or max_position)
        length = max(float(max_position), original)
        base = theta * ((factor * length / original) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base**exponents, 1.0
    if kind == "llama3":
        return _llama3(inverse, scaling, factor), 1.0
    return _yarn(inverse, dim, theta, scaling, factor, max_position)


def _need(scaling: Mapping[str, Any], key: str, kind: str) -> Any:
    if scaling.get(key) is None:
        raise ConfigurationError(
            f"A parameter of rotary scaling {kind!r} is missing: got {sorted(scaling)}, expected {key!r}."
        )
    return scaling[key]


def _llama3(inverse: torch.Tensor, scaling: Mapping[str, Any], factor: float) -> torch.Tensor:
    """Return the inverse frequencies of Llama 3. Source: transformers, `_compute_llama3_parameters`."""
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
    """Return the inverse frequencies of LongRoPE, and the factor on cosine and sine.

    As in vLLM, the long factors apply to all sequences if the model's `max_position_embeddings` exceeds its original
    length. transformers uses the short factors for short inputs, which changes the meaning of a cached prefix when a
    sequence grows.

    Source: Ding et al. 2024, "LongRoPE"; transformers, `_compute_longrope_parameters`.
    """
    original = float(_need(scaling, "original_max_position_embeddings", "longrope"))
    long = max_position > original
    given = _need(scaling, "long_factor" if long else "short_factor", "longrope")
    factors = torch.tensor(given, dtype=torch.float32, device="cpu")
    if len(factors) != len(exponents):
        raise ConfigurationError(
            f"The number of factors of rotary scaling 'longrope' is wrong: got {len(factors)}, expected "
            f"{len(exponents)}."
        )
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
    """Return the inverse frequencies of YaRN, and the factor on cosine and sine.

    Source: Peng et al. 2023, "YaRN"; transformers, `_compute_yarn_parameters`.
    """
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
    """The cosines and sines of positions. All layers of a model can share one instance.

    Args:
        head_dim: size of a head.
        theta: base of the frequencies.
        scaling: a Hugging Face `rope_scaling` or `rope_parameters` mapping with a `rope_type` of `default`, `linear`,
            `dynamic`, `yarn`, `llama3` or `longrope`; None for no scaling.
        max_position: the model's `max_position_embeddings`.
        rotary_dim: size of the rotated part of each head; default: `head_dim`.

    Raises:
        ConfigurationError: the rotary dimension is odd, or the scaling is unknown or incomplete.

    Examples:
        >>> rotary = RotaryEmbedding(64, theta=500000.0)
        >>> cos, sin = rotary(torch.arange(5), torch.bfloat16)
        >>> cos.shape, cos.dtype
        (torch.Size([5, 1, 32]), torch.bfloat16)
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
        self._float32, self.factor = rotary_frequencies(self.rotary_dim, theta, scaling, max_position)
        # Not persistent: checkpoints do not contain it, so that a weight reload in a server would leave it undefined.
        self.register_buffer("inverse_frequencies", self._float32.to(torch.get_default_device()), persistent=False)
        self.inverse_frequencies: torch.Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """Move the frequencies to the model's device, but keep them float32: `model.to(bfloat16)` would round them."""
        super()._apply(fn, recurse)
        self.inverse_frequencies = self._float32.to(self.inverse_frequencies.device)
        return self

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine of int64 positions, each `[*positions.shape, 1, rotary_dim / 2]`, in `dtype`."""
        if self.inverse_frequencies.device != positions.device:  # created before the model was moved to its device
            self.inverse_frequencies = self._float32.to(positions.device)
        # float32 in models of lower precision as well: integers above 256 are not exact in bfloat16.
        angles = positions.unsqueeze(-1).float() * self.inverse_frequencies.float()
        cos, sin = ((f(angles) * self.factor).to(dtype).unsqueeze(-2) for f in (torch.cos, torch.sin))
        if torch.compiler.is_compiling() and cos.device.type == "cpu":
            return _computed_once(cos), _computed_once(sin)
        return cos, sin


def halves(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Reorder heads `[..., head_dim]` from interleaved pairs (2i, 2i + 1) to pairs (i, i + rotary_dim / 2).

    Applied to both queries and keys, the permutation changes no score. Hugging Face applies it to the weights when it
    converts a checkpoint.
    """
    rotated, rest = x.split([rotary_dim, x.shape[-1] - rotary_dim], dim=-1)
    apart = rotated.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return apart if not rest.shape[-1] else torch.cat((apart, rest), dim=-1)


def rotate_heads(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the rotary embedding to queries and keys; see `apply_rotary`."""
    if not torch.compiler.is_compiling() and native.supports(q, cos) and native.supports(k, cos):
        return _Rotation.apply(q, k, cos, sin)
    return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)


class _Rotation(torch.autograd.Function):
    """`apply_rotary` of queries and keys by the native kernel; cosine and sine get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return native.rotate(q, cos, sin), native.rotate(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        to_q, to_k = (native.rotate(gradient.to(cos.dtype), cos, sin, -1) for gradient in gradients)
        return to_q, to_k, None, None


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to heads `[..., heads, head_dim]`, in float32 or wider as in vLLM.

    Args:
        x: queries or keys.
        cos: `[..., 1, rotary_dim / 2]`.
        sin: the shape of `cos`.

    Returns:
        A new tensor in the shape and dtype of `x`.
    """
    dim = cos.shape[-1] * 2
    rotated, rest = (x, None) if dim == x.shape[-1] else x.split([dim, x.shape[-1] - dim], dim=-1)
    wide = rotated if rotated.dtype == torch.float64 else rotated.float()
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)
