"""Timing on CPU and CUDA: alternating rounds, medians, and a measured matmul peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds of one call of `action`, averaged over `repeats` calls without synchronization in between."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def alternating(
    actions: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, repeats: int = 1
) -> dict[str, float]:
    """Return the median seconds of each action over `rounds` alternating rounds, after one round of warm-up."""
    found = times_of_rounds(actions, device, rounds, repeats)
    return {name: statistics.median(spent) for name, spent in found.items()}


def times_of_rounds(
    actions: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each action in each of `rounds` alternating rounds, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            times[name].append(seconds(actions[name], device, repeats))
    return {name: spent[1:] for name, spent in times.items()}


def ratio_of_rounds(times: Mapping[str, list[float]], name: str, other: str) -> float:
    """Return the median, over the rounds, of the time of an action divided by that of another.

    Both run in every round, so the ratio is not affected if the machine is slower in some rounds than in others.
    """
    return statistics.median(mine / theirs for mine, theirs in zip(times[name], times[other]))


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of a large square matmul on random data, the peak against which utilization is measured."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    spent = statistics.median(seconds(lambda: a @ b, device) for _ in range(10))
    return 2 * size**3 / spent


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of the memory that one call of `action` takes; on CPU the profiler's allocations are summed."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        action()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    with torch.profiler.profile(profile_memory=True) as profile:
        action()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # pyrefly: ignore[missing-attribute]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
