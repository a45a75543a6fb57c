"""Initial weights that are the same full tensors at every tensor-parallel size and in every library.

A full tensor is drawn for each name of the checkpoint from a generator seeded by that name, then sliced. Fused and
separate projections therefore start alike too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.weight_table import collect_layouts, copy_into_shard, stored_shape

Initializer = Callable[[str, tuple[int, ...], torch.Generator], torch.Tensor]


def generator_for(name: str, seed: int) -> torch.Generator:
    """A CPU generator that depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal_initializer(std: float = 0.02) -> Initializer:
    """Matrices from N(0, std²), biases and attention sinks 0, other vectors (norms) 1, all in float32."""

    def initialize(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        if name.endswith(("bias", "sinks")):
            return torch.zeros(shape, dtype=torch.float32)
        if len(shape) < 2:
            return torch.ones(shape, dtype=torch.float32)
        return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)

    return initialize


def initialize_weights(
    model: nn.Module,
    parallel_context: ParallelContext,
    *,
    seed: int = 0,
    initializer: Initializer | None = None,
) -> None:
    """Fill every parameter of `model` in place; no communication, and nothing depends on torch's global state.

    Args:
        model: as its factory built it, before an engine wraps it.
        parallel_context: the context that it was built with.
        seed: the same on all ranks.
        initializer: `(checkpoint name, logical shape, generator) -> full tensor`; default `normal_initializer()`.
    """
    draw = initializer or normal_initializer()
    rank = parallel_context.get_tensor_parallel_rank()
    size = parallel_context.get_tensor_parallel_world_size()
    parameters = dict(model.named_parameters())
    with torch.device("cpu"):
        for entry in collect_layouts(model).values():
            count = len(entry.checkpoint_names)
            for index, name in enumerate(entry.checkpoint_names):
                shape = stored_shape(entry.layout, count, index)
                full = draw(name, shape, generator_for(name, seed))
                copy_into_shard(parameters[entry.parameter], entry.layout, count, index, full, rank, size)
