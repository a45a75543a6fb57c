"""Simulation of tensor-parallel ranks and a serving engine's cache in one process, for the trial of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polyshard.attention.functional import packed_attention
from polyshard.core.attention import AttentionSpec, PackedSequences
from polyshard.core.context import GroupContext, ParallelAxis
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import ConfigurationError
from polyshard.core.parallel_layout import ParallelLayout


class Exchange:
    """The point of exchange between the threads of all simulated ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=120.0)
        self.building = threading.Lock()  # transformers changes torch's default dtype and a config during construction
        self.given: list[Any] = [None] * size

    def all(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks, in rank order."""
        self.given[rank] = tensor
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()  # no rank may write its next tensor before all have read this one
        return found


@dataclass(frozen=True, slots=True)
class _Collectives:
    """`Collectives` between threads."""

    exchange: Exchange
    rank: int

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Return the elementwise `sum` or `max`."""
        stacked = torch.stack(self.exchange.all(self.rank, tensor))
        return stacked.sum(0) if op == "sum" else stacked.amax(0)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the concatenation along `dim`."""
        return torch.cat(self.exchange.all(self.rank, tensor), dim)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's part of the sum."""
        return self.all_reduce(tensor).chunk(self.exchange.size, dim)[self.rank].contiguous()


class Schedule:
    """The tokens of each sequence that a simulated engine passes to the model in the current step."""

    def __init__(self) -> None:
        self.step: Sequence[tuple[int, int]] = ()  # (sequence, number of tokens)


@dataclass
class CachedAttention:
    """An `AttentionCore` with a cache of keys and values, like that of a serving engine."""

    spec: AttentionSpec
    schedule: Schedule
    sinks: torch.Tensor | None
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PackedSequences | None
    ) -> torch.Tensor:
        """Add keys and values to the cache, and compute attention."""
        step, spec = self.schedule.step, self.spec
        counts = [count for _, count in step]
        for (sequence, _), new_keys, new_values in zip(step, k.split(counts), v.split(counts)):
            for cache, new in ((self.keys, new_keys), (self.values, new_values)):
                cache[sequence] = torch.cat((cache[sequence], new)) if sequence in cache else new
        keys, values = (torch.cat([cache[i] for i, _ in step]) for cache in (self.keys, self.values))
        return packed_attention(
            q,
            keys,
            values,
            _bounds(counts),
            keys=_bounds([len(self.keys[i]) for i, _ in step]),
            scale=spec.scale,
            causal=spec.causal,
            sliding_window=spec.sliding_window,
            softcap=spec.softcap,
            sinks=self.sinks,
        )


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)


def simulated_context(rank: int, exchange: Exchange, schedule: Schedule | None) -> GroupContext:
    """Return the parallel context of one simulated rank; with a schedule, that of a simulated engine."""
    size = exchange.size
    axis = ParallelAxis(
        name="tensor",
        ranks=tuple(range(size)),
        rank=rank,
        collectives=_Collectives(exchange, rank) if size > 1 else None,
    )

    def attention(spec: AttentionSpec, sinks: torch.Tensor | None = None) -> CachedAttention:
        if not spec.causal:
            raise ConfigurationError(
                f"attention layer {spec.layer_index} is not causal: got causal=False, but serving engines only support "
                "causal decoders. Use the model only in training."
            )
        assert schedule is not None
        return CachedAttention(spec, schedule, sinks)

    return GroupContext(
        layout=ParallelLayout(tensor=size),
        device=torch.device("cpu"),
        linear=load_adapter("torch").linear,
        axes={"tensor": axis},
        rank=rank,
        attention=None if schedule is None else attention,
        initialize_weights=False,
    )


def on_simulated_ranks(size: int, function: Callable[[int, Exchange], Any]) -> list[Any]:
    """Call `function(rank, exchange)` for each rank, in one thread per rank, without gradients.

    Raises:
        Exception: the exception of the first failing rank.
    """
    exchange = Exchange(size)
    results: list[Any] = [None] * size
    failures: list[Exception] = []

    def run(rank: int) -> None:
        try:
            with torch.device("cpu"), torch.no_grad():  # both settings are per thread
                results[rank] = function(rank, exchange)
        except Exception as error:
            if not isinstance(error, threading.BrokenBarrierError):
                failures.append(error)
            exchange.barrier.abort()

    if size == 1:
        run(0)
    else:
        threads = [threading.Thread(target=run, args=(rank,), name=f"simulated rank {rank}") for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return results
