"""The suite's reference: the same model in plain torch operations on full tensors, in any float dtype.

It shares no code with the layers under test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional as F

from polyshard.testing.model import SuiteConfig

Weights = Mapping[str, torch.Tensor]


def reference_weights(
    config: SuiteConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Return full weights by checkpoint name; biases and norms are random, so that a misplaced one has an effect."""
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, h), "norm.weight": (h,)}
    if not config.tied:
        shapes["head.weight"] = (config.vocab_size, h)
    for i in range(config.num_layers):
        block = f"blocks.{i}."
        shapes |= {f"{block}norm1.weight": (h,), f"{block}norm2.weight": (h,)}
        shapes |= {f"{block}attention.{n}_norm.weight": (d,) for n in "qk"}
        for name, rows, columns in (
            ("attention.q_proj", q, h),
            ("attention.k_proj", kv, h),
            ("attention.v_proj", kv, h),
            ("attention.o_proj", h, q),
            ("gate", f, h),
            ("up", f, h),
            ("down", h, f),
        ):
            shapes |= {f"{block}{name}.weight": (rows, columns), f"{block}{name}.bias": (rows,)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        scale, offset = (0.15, 0.0) if len(shape) == 2 else (0.2, 0.0 if name.endswith("bias") else 1.0)
        weights[name] = (offset + scale * noise).to(dtype)
    return weights


def reference_logits(weights: Weights, input_ids: torch.Tensor, config: SuiteConfig) -> torch.Tensor:
    """Return logits `[batch, seq, vocabulary]`."""
    x = weights["embed.weight"][input_ids]
    for i in range(config.num_layers):
        w = {name.removeprefix(f"blocks.{i}."): t for name, t in weights.items() if name.startswith(f"blocks.{i}.")}
        x = x + _attention(_rms(x, w["norm1.weight"]), w, config)
        h = _rms(x, w["norm2.weight"])
        x = x + _linear(F.silu(_linear(h, w, "gate")) * _linear(h, w, "up"), w, "down")
    head = weights["embed.weight"] if config.tied else weights["head.weight"]
    return _rms(x, weights["norm.weight"]) @ head.T


def reference_loss(
    weights: Weights, input_ids: torch.Tensor, labels: torch.Tensor, config: SuiteConfig
) -> torch.Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(reference_logits(weights, input_ids, config).flatten(0, 1), labels.flatten())


def reference_run(
    config: SuiteConfig, input_ids: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Return `loss`, `logits`, and the gradient of every weight by name."""
    leaves = {name: w.requires_grad_() for name, w in reference_weights(config, dtype=dtype).items()}
    loss = reference_loss(leaves, input_ids, labels, config)
    loss.backward()
    logits = reference_logits(leaves, input_ids, config)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


def reference_training(
    config: SuiteConfig,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms of torch's AdamW and `clip_grad_norm_` in one process, in float64."""
    leaves = {name: w.requires_grad_() for name, w in reference_weights(config).items()}
    groups = [
        {"params": [w for w in leaves.values() if w.dim() >= 2], "weight_decay": weight_decay},
        {"params": [w for w in leaves.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for input_ids, labels in batches:
        loss = reference_loss(leaves, input_ids, labels, config)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(leaves.values(), max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def reference_updates(
    config: SuiteConfig, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, lr: float, eps: float
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses, and the weights after AdamW updates without decay or clipping, in one process, in float64."""
    leaves = {name: w.requires_grad_() for name, w in reference_weights(config).items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0)
    losses = []
    for input_ids, labels in batches:
        loss = reference_loss(leaves, input_ids, labels, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: leaf.detach() for name, leaf in leaves.items()}


def _rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate heads `[batch, heads, seq, dim]` by position, as complex numbers of pairs (i, i + dim / 2)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def _attention(x: torch.Tensor, w: Weights, config: SuiteConfig) -> torch.Tensor:
    def heads(name: str) -> torch.Tensor:
        return _linear(x, w, f"attention.{name}").unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    q = _rotate(_rms(heads("q_proj"), w["attention.q_norm.weight"]))
    k = _rotate(_rms(heads("k_proj"), w["attention.k_norm.weight"]))
    group = config.num_heads // config.num_kv_heads
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, heads("v_proj")))
    scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return _linear(out.transpose(1, 2).flatten(-2), w, "attention.o_proj")
