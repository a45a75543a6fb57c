"""Random number generators of a process: seeding by place, states to save, and a check over ranks.

One rule: ranks that share an activation (tensor, context and pipeline ranks of one data-parallel rank) hold generators
in one state; each data-parallel rank has its own. `polyshard.manual_seed` sets them so.
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
from polyshard.core.layout import Axis

logger = logging.getLogger(__name__)

States = dict[str, torch.Tensor]

_MIX = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: multiples are far apart
_SEEDS = 2**63


def manual_seed(seed: int, parallel_context: ParallelContext) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch, on CPU and GPU, for this rank's place.

    Ranks that share an activation get the same state; each data-parallel rank gets its own, and rank 0 that of
    `torch.manual_seed(seed)`.

    Args:
        seed: the run's, 0 or more; the same on every rank.
        parallel_context: where this process stands.

    Raises:
        ConfigurationError: the seed is negative or no integer.

    Example:
        >>> import polyshard as ps, torch
        >>> context = ps.initialize("torch", device="cpu")
        >>> ps.manual_seed(7, context)
        >>> first = torch.rand(3)
        >>> torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
        True
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigurationError(f"seed must be an integer of 0 or more: got {seed!r}")
    seed_all(mixed(seed, parallel_context.axis("data").rank))


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy (if it is imported) and torch with one number below 2**63."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])


def mixed(seed: int, number: int) -> int:
    """Return a seed for a numbered part of what has a seed; part 0 keeps it."""
    return (seed + _MIX * number) % _SEEDS


@contextmanager
def sharded_random(parallel_context: ParallelContext) -> Iterator[None]:
    """Inside, torch's random operations draw other numbers on each tensor-parallel and context-parallel rank.

    For operations on activations that are cut over these ranks, such as `torch.nn.Dropout` under sequence parallelism.
    The seed of the region is drawn from torch's generator, so that recomputation (`torch.utils.checkpoint`) draws the
    same numbers again. `polyshard.Dropout` needs no such region.
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
    """Return the states of torch's generators: of the CPU, and of this process's GPU if CUDA is in use."""
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
        if kind == "MT19937":  # NumPy's global generator; nothing else can be set as it
            found["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64)
            found["numpy_gauss"] = torch.tensor([cached], dtype=torch.float64)
    return found


def restore(states: Mapping[str, torch.Tensor]) -> None:
    """Set the generators to states that `torch_states` or `all_states` gave; those that are missing are left alone."""
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
    """Return 48 bits that stand for states."""
    hashed = hashlib.blake2b(digest_size=6)
    for name in sorted(states):
        hashed.update(states[name].numpy().tobytes())
    return int.from_bytes(hashed.digest(), "little")


class GeneratorCheck:
    """Compares torch's generators over the ranks once, before an engine's first update.

    Ranks that share an activation and drop it with different masks hold other gradients of replicated weights, which
    then drift apart. Nothing is compared if the model drew no random number.

    Args:
        model: the engine's.
        context: the engine's.
        enabled: False checks nothing.

    Raises:
        ConfigurationError: activations are cut over ranks along the tokens, and the model has a `torch.nn.Dropout`,
            which would draw one mask for the tokens of all of them.
    """

    def __init__(self, model: nn.Module, context: ParallelContext, enabled: bool) -> None:
        self._context, self._left, self._drew = context, enabled, False
        cut = context.axis("context").size > 1 or (context.layout.sequence_parallel and context.axis("tensor").size > 1)
        if enabled and cut:
            _refuse_plain_dropout(model)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around each forward: whether it draws."""
        if not self._left:
            yield
            return
        before = digest(torch_states())
        yield
        self._drew = self._drew or digest(torch_states()) != before

    def compare(self) -> None:
        """Before each update; only the first one communicates.

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
                    "activations that these ranks share are dropped differently, and replicated weights drift apart. "
                    "Call polyshard.manual_seed(seed, context) with the same seed on every rank, or pass "
                    "check_random=False to the engine"
                )
        if self._differs("data") is False:
            logger.warning(
                "all data-parallel ranks draw the same random numbers, as if by torch.manual_seed(seed): call "
                "polyshard.manual_seed(seed, context) for masks of their own"
            )

    def _differs(self, name: Axis) -> bool | None:
        """Whether the states differ over an axis; None if no rank drew, or the axis has one rank."""
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
                "polyshard.sharded_random(context) and pass check_random=False to the engine"
            )
