"""Serving a model: which sizes fit, how many tokens the KV cache holds, and how fast decoding can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.attention import AttentionSpec
from polyshard.core.errors import LayoutError
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.planning.cluster import Cluster
from polyshard.planning.strategy import divisors
from polyshard.planning.trace import build

_USED = 0.9  # part of a GPU's memory that vLLM uses by default (gpu_memory_utilization)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """Engines of one tensor-parallel size.

    Attributes:
        tensor: GPUs of an engine.
        engines: number of engines.
        weights: bytes of weights on a GPU.
        cache_per_token: bytes of the KV cache for one token on a GPU.
        cache_tokens: tokens that an engine's cache holds.
        sequences: sequences of the planned length that an engine's cache holds.
        decode_seconds: smallest time of a decoding step with that many sequences: reading weights and cache, and two
            all-reduces per block.
        tokens_per_second: of all engines together, while they decode that many sequences.

    Examples:
        >>> config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
        ...           "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
        >>> cluster = ps.Cluster(gpus=2, memory=80 * 2**30)
        >>> found = ps.plan(
        ...     config, cluster=cluster, tokens_per_step=512, sequence_length=256, recompute=("full",), serve=2
        ... )
        >>> [(plan.tensor, plan.engines, plan.fits) for plan in found.serving]
        [(1, 2, True), (2, 1, True)]
    """

    tensor: int
    engines: int
    weights: int
    cache_per_token: int
    cache_tokens: int
    sequences: int
    decode_seconds: float
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        """Whether the weights and one sequence fit."""
        return self.sequences > 0


def serving_plans(
    factory: Callable[..., nn.Module],
    config: Any,
    gpus: int,
    length: int,
    cluster: Cluster,
    refuse: Callable[[str], None],
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[ServingPlan, ...]:
    """Return a plan for every tensor-parallel size of one node, those with the most tokens per second first.

    Args:
        factory: builds the model.
        config: its first argument.
        gpus: for serving.
        length: tokens of a sequence.
        cluster: the machines.
        refuse: called with the reason for which a size is impossible.
        dtype: of weights and cache.
    """
    found = []
    for tensor in divisors(gpus):
        if tensor > cluster.gpus_per_node:
            break
        try:
            model = build(factory, config, ParallelLayout(tensor=tensor), dtype)
        except LayoutError as error:
            refuse(f"serving: {error}")
            continue
        found.append(_plan(model, tensor, gpus // tensor, length, cluster, dtype))
    return tuple(sorted(found, key=lambda plan: -plan.tokens_per_second))


def _plan(
    model: nn.Module, tensor: int, engines: int, length: int, cluster: Cluster, dtype: torch.dtype
) -> ServingPlan:
    found = (getattr(part, "spec", None) for part in model.modules())
    specs = [spec for spec in found if isinstance(spec, AttentionSpec)]
    latents = [latent for part in model.modules() if (latent := _latent(part))]
    weights = sum(p.nbytes for p in model.parameters())
    heads = sum(s.num_kv_heads * (s.head_dim + s.v_dim) for s in specs) if not latents else 0
    each = (heads + sum(latents)) * dtype.itemsize
    tokens = max(0, int(cluster.memory * _USED) - weights) // each if each else 0
    sequences = tokens // length
    hidden = _hidden(model)
    sent = 2 * 2 * (tensor - 1) / tensor * len(specs) * sequences * hidden * dtype.itemsize
    read = weights + sequences * length * each
    seconds = read / (cluster.memory_bandwidth * 1e9) + sent / cluster.bandwidth(tensor)
    return ServingPlan(
        tensor=tensor,
        engines=engines,
        weights=weights,
        cache_per_token=each,
        cache_tokens=tokens,
        sequences=sequences,
        decode_seconds=seconds,
        tokens_per_second=engines * sequences / seconds,
    )


def _latent(part: nn.Module) -> int:
    """Return the elements per token of a layer that caches latents, which every rank holds; 0 for others."""
    rank = getattr(part, "kv_lora_rank", None)
    return 0 if rank is None else rank + part.parts[1]  # pyrefly: ignore


def _hidden(model: nn.Module) -> int:
    return min((p.shape[-1] for name, p in model.named_parameters() if name.endswith("norm.weight")), default=0)
