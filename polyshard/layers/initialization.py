"""Initial weights that are the same full tensors at every tensor-parallel size and in every library.

A full tensor is drawn for each checkpoint name from a generator seeded by that name, and then sliced. Fused and
separate projections therefore start with equal weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.engine_copies import check_not_held
from polyshard.core.weight_table import collect_layouts, copy_into_shard, is_stored_here, stored_shape

Initializer = Callable[[str, tuple[int, ...], torch.Generator], torch.Tensor]


def generator_for(name: str, seed: int) -> torch.Generator:
    """Return a CPU generator that depends only on the name and the seed."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal_initializer(std: float = 0.02) -> Initializer:
    """Return an initializer: matrices from N(0, std²), biases and sinks 0, other vectors (norms) 1, in float32.

    Examples:
        >>> draw = ps.normal_initializer(std=0.02)
        >>> draw("norm.weight", (2,), torch.Generator())
        tensor([1., 1.])
    """

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
    """Fill every parameter of `model` in place, without communication and independently of torch's global random state.

    Args:
        model: a model as its factory built it, before an engine wraps it.
        parallel_context: the context that the model was built with.
        seed: the same on all ranks.
        initializer: `(checkpoint name, logical shape, generator) -> full tensor`; `normal_initializer()` by default.

    Raises:
        ConfigurationError: an engine around the model keeps the weights elsewhere.

    Examples:
        >>> context = ps.initialize("torch")
        >>> first, second = (ps.column_parallel(4, 8, context) for _ in range(2))
        >>> for layer in (first, second):
        ...     ps.initialize_weights(layer, context, seed=1)
        >>> torch.equal(first.weight, second.weight)
        True
    """
    check_not_held(model, written=True)
    draw = initializer or normal_initializer()
    rank = parallel_context.get_tensor_parallel_rank()
    size = parallel_context.get_tensor_parallel_world_size()
    parameters = dict(model.named_parameters())
    with torch.device("cpu"):
        for entry in collect_layouts(model).values():
            count = len(entry.checkpoint_names)
            for index, name in enumerate(entry.checkpoint_names):
                if not is_stored_here(entry.layout, count, index):
                    continue
                shape = stored_shape(entry.layout, count, index)
                full = draw(name, shape, generator_for(name, seed))
                copy_into_shard(parameters[entry.parameter], entry.layout, count, index, full, rank, size)
