"""Meta's reference forward on its own files, with Meta's names, layouts, interleaved rotary embedding and params.

`--verify` compares its logits with those of transformers on the converted directory. It shares no code with the
conversion.
Source: llama/model.py in meta-llama/llama3, and `apply_scaling` in llama-models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

State = Mapping[str, torch.Tensor]


def merged(ranks: list[State]) -> dict[str, torch.Tensor]:
    """Join the shards of all ranks along their sharded dimension: 0 for column layers, 1 for row layers."""
    if len(ranks) == 1:
        return dict(ranks[0])
    full: dict[str, torch.Tensor] = {}
    for name, part in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if part.dim() < 2:
            full[name] = part
        elif name.startswith("tok_embeddings"):  # sharded along the width in Llama 1 and 2, the vocabulary in Llama 3
            full[name] = torch.cat(parts, dim=0 if part.shape[1] == ranks[0]["norm.weight"].shape[0] else 1)
        else:
            full[name] = torch.cat(parts, dim=1 if ".wo." in name or ".w2." in name else 0)
    return full


def reference_logits(
    path: Path,
    ranks: list[State],
    ids: torch.Tensor,
    rounded: torch.dtype | None,
    constants: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Return float64 logits `[tokens, vocabulary]` of token IDs `[1, tokens]`.

    Args:
        path: the checkpoint's directory with `params.json`.
        ranks: the tensors of each rank.
        ids: token IDs.
        rounded: dtype to which the weights are rounded first; None for no rounding.
        constants: constants of the rotary scaling, used if `params.json` does not contain them.
    """
    params = json.loads((path / "params.json").read_text())
    state = merged(ranks)
    if not params.get("rope_scaling") and not params.get("rope_scaling_factor"):
        params["rope_scaling"] = constants

    def weight(name: str) -> torch.Tensor:
        value = state[name]
        return (value if rounded is None else value.to(rounded)).double()

    tokens = ids.shape[1]
    table = _table(params, tokens)
    position = torch.arange(tokens)
    hidden = position[None] > position[:, None]
    if params.get("sliding_window"):
        hidden |= position[:, None] - position[None] >= params["sliding_window"]
    mask = torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(hidden, -math.inf)
    x = weight("tok_embeddings.weight")[ids[0]]
    for i in range(params["n_layers"]):
        x = _block(f"layers.{i}.", x, weight, params, table, mask)
    return _norm(x, weight("norm.weight"), params) @ weight("output.weight").T


def _block(prefix: str, x: torch.Tensor, weight: Any, params: dict[str, Any], table: Any, mask: Any) -> torch.Tensor:
    heads = params["n_heads"]
    kv_heads = params.get("n_kv_heads") or heads
    normed = _norm(x, weight(f"{prefix}attention_norm.weight"), params)
    q, k, v = (normed @ weight(f"{prefix}attention.{name}.weight").T for name in ("wq", "wk", "wv"))
    q, k = (_rotated(t.unflatten(1, (n, -1)), table) for t, n in ((q, heads), (k, kv_heads)))
    v = v.unflatten(1, (kv_heads, -1))
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1]) + mask
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    x = x + out @ weight(f"{prefix}attention.wo.weight").T
    normed = _norm(x, weight(f"{prefix}ffn_norm.weight"), params)
    gate, up = (normed @ weight(f"{prefix}feed_forward.{name}.weight").T for name in ("w1", "w3"))
    return x + (F.silu(gate) * up) @ weight(f"{prefix}feed_forward.w2.weight").T


def _norm(x: torch.Tensor, weight: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params.get("norm_eps", 1e-5)) * weight


def _table(params: dict[str, Any], tokens: int) -> torch.Tensor:
    """Return complex rotations `[tokens, head_dim / 2]`."""
    size = params.get("head_dim") or params["dim"] // params["n_heads"]
    frequencies = [params.get("rope_theta", 10000.0) ** (-2 * i / size) for i in range(size // 2)]
    if params.get("use_scaled_rope"):
        stored = params.get("rope_scaling") or {}
        frequencies = [_scaled(f, stored, params.get("rope_scaling_factor") or 8) for f in frequencies]
    angles = torch.outer(torch.arange(tokens).double(), torch.tensor(frequencies, dtype=torch.float64))
    return torch.polar(torch.ones_like(angles), angles)


def _scaled(frequency: float, stored: dict[str, Any], default: float) -> float:
    factor, low = stored.get("factor", default), stored.get("low_freq_factor", 1)
    high, length = stored.get("high_freq_factor", 4), stored.get("original_max_position_embeddings", 8192)
    wavelength = 2 * math.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels, each pair as one complex number."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * table[:, None]
    return torch.view_as_real(turned).flatten(-2)
