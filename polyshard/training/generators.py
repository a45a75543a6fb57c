"""Random number generators of a process: seeding, states to save, and a consistency check over ranks.

Ranks that share an activation (the tensor and context ranks of one data-parallel rank and pipeline stage) must have
generators in the same state; data-parallel ranks and stages have different states, so that no two layers draw the same
masks. `polyshard.manual_seed` sets them accordingly.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.parallel_layout import Axis

logger = logging.getLogger(__name__)

States = dict[str, torch.Tensor]

_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: multiples are far apart
_SEEDS = 2**63


def manual_seed(seed: int, parallel_context: ParallelContext) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch, on CPU and GPU, for this rank.

    Ranks that share an activation get the same state, data-parallel ranks and pipeline stages different ones; that of
    rank 0 is the state after `torch.manual_seed(seed)`.

    Args:
        seed: the seed of the run, 0 or more; the same on every rank.
        parallel_context: the parallel context.

    Raises:
        ConfigurationError: the seed is negative or not an integer.

    Examples:
        >>> context = ps.initialize("torch", device="cpu")
        >>> ps.manual_seed(7, context)
        >>> first = torch.rand(3)
        >>> torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
        True
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigurationError(f"the seed is invalid: got {seed!r}, expected an integer of 0 or more")
    data, pipeline = parallel_context.axis("data"), parallel_context.axis("pipeline")
    seed_all(mixed(seed, data.rank + data.size * pipeline.rank))


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch with one number below 2**63."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])


def mixed(seed: int, number: int) -> int:
    """Return the seed of a numbered part of a seeded whole; part 0 keeps the seed."""
    return (seed + _MIX * number) % _SEEDS


@contextmanager
def sharded_random(parallel_context: ParallelContext) -> Iterator[None]:
    """Draw different random numbers on each tensor-parallel and context-parallel rank inside the context manager.

    Use it for operations on activations that are sharded over these ranks, such as `torch.nn.Dropout` under sequence
    parallelism. The seed of the region is drawn from torch's generator, so recomputation (`torch.utils.checkpoint`)
    draws the same numbers. `polyshard.Dropout` does not need it.

    Examples:
        >>> context = ps.initialize("torch")
        >>> with ps.sharded_random(context):
        ...     y = torch.nn.functional.dropout(torch.ones(4), 0.5)
        >>> y.shape
        torch.Size([4])
    """
    seed = int(torch.randint(_SEEDS - 1, (), device="cpu"))
    before = torch_states()
    tensor, context = parallel_context.axis("tensor"), parallel_context.axis("context")
    torch.manual_seed(mixed(seed, 1 + tensor.rank + tensor.size * context.rank))
    try:
        yield
    finally:
        restore(before)


def torch_states() -> States:
    """Return the states of torch's generators: of the CPU, and of this process's GPU if CUDA is initialized."""
    found = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def all_states() -> States:
    """Return the states of torch's, Python's and NumPy's generators as tensors."""
    version, words, gauss = random.getstate()
    found = torch_states() | {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        if kind == "MT19937":  # only this kind can be restored
            found["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64)
            found["numpy_gauss"] = torch.tensor([cached], dtype=torch.float64)
    return found


def restore(states: Mapping[str, torch.Tensor]) -> None:
    """Set the generators to states returned by `torch_states` or `all_states`; missing ones are left unchanged."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "python" in states:
        version, *words = states["python"].tolist()
        gauss = states["python_gauss"].tolist()
        random.setstate((version, tuple(words), gauss[0] if gauss else None))
    if "numpy" in states:
        import numpy

        *keys, position, has_gauss = states["numpy"].tolist()
        cached = float(states["numpy_gauss"])
        numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))


def digest(states: Mapping[str, torch.Tensor]) -> int:
    """Return a 48-bit hash of generator states."""
    hashed = hashlib.blake2b(digest_size=6)
    for name in sorted(states):
        hashed.update(states[name].numpy().tobytes())
    return int.from_bytes(hashed.digest(), "little")


class GeneratorCheck:
    """A check that compares torch's generators over the ranks once, before an engine's first update.

    Ranks that share an activation but drop it with different masks compute different gradients of replicated weights,
    which then diverge. Nothing is compared if the model draws no random number.

    Args:
        model: the engine's model.
        context: the engine's parallel context.
        enabled: False disables the check.

    Raises:
        ConfigurationError: activations are sharded along the tokens, and the model has a `torch.nn.Dropout`, which
            would draw the same mask for the tokens of every rank.
    """

    def __init__(self, model: nn.Module, context: ParallelContext, enabled: bool) -> None:
        self._context, self._left, self._drew = context, enabled, False
        cut = context.axis("context").size > 1 or (context.layout.sequence_parallel and context.axis("tensor").size > 1)
        if enabled and cut:
            _refuse_plain_dropout(model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record whether a forward pass inside the context manager draws a random number."""
        if not self._left:
            yield
            return
        before = digest(torch_states())
        yield
        self._drew = self._drew or digest(torch_states()) != before

    def compare(self) -> None:
        """Compare the generators; call it before each update. Only the first call communicates.

        Raises:
            ConfigurationError: generators that must agree differ; raised on every rank that is compared.
        """
        if not self._left:
            return
        self._left = False
        for name in ("tensor", "context"):
            if self._differs(name) is True:
                raise ConfigurationError(
                    f"random generators differ over the {name}-parallel ranks, and the model draws from them: "
                    "activations that these ranks share are dropped differently, and replicated weights diverge. "
                    "Call polyshard.manual_seed(seed, context) with the same seed on every rank, or pass "
                    "check_random=False to the engine."
                )
        if self._differs("data") is False:
            logger.warning(
                "all data-parallel ranks draw the same random numbers, as after torch.manual_seed(seed). Call "
                "polyshard.manual_seed(seed, context) for different masks."
            )

    def _differs(self, name: Axis) -> bool | None:
        """Return whether the states differ over an axis; None if no rank drew, or the axis has one rank."""
        axis = self._context.axis(name)
        if axis.size == 1:
            return None
        assert axis.collectives is not None
        mine = float(digest(torch_states()))
        figures = torch.tensor([float(self._drew), mine, -mine], dtype=torch.float64, device=self._context.device)
        drew, most, least = axis.collectives.all_reduce(figures, "max").tolist()
        return most != -least if drew else None


def _refuse_plain_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ConfigurationError(
                f"{name} is a torch.nn.{type(module).__name__}, which would draw the same mask for the tokens of every "
                "sequence-parallel or context-parallel rank. Use polyshard.Dropout(p, context), or run it under "
                "polyshard.sharded_random(context) and pass check_random=False to the engine."
            )
