"""Profiles of a few steps, by torch.profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from polyshard.core.context import ParallelContext
from polyshard.core.ranks import Ranks


def profile_steps(
    directory: str | Path,
    parallel_context: ParallelContext,
    *,
    wait: int = 2,
    warmup: int = 1,
    active: int = 2,
    **options: Any,
) -> profile:
    """Return a `torch.profiler.profile` that writes a Chrome trace of each rank for some steps of a run.

    Enter it around the loop, and call its `step()` after each training step. The traces are
    `DIRECTORY/rank-00000.json`, for chrome://tracing or https://ui.perfetto.dev.

    Args:
        directory: created if it does not exist.
        parallel_context: the parallel context.
        wait: steps before the profiler starts.
        warmup: steps that it runs without recording.
        active: steps that are recorded.
        options: further arguments of `torch.profiler.profile`, such as `profile_memory=True`.

    Examples:
        >>> with profile_steps("trace", ps.initialize("torch"), wait=0, warmup=1, active=1) as profiler:
        ...     for _ in range(2):
        ...         total = torch.ones(4).sum()
        ...         profiler.step()
        >>> import os
        >>> os.listdir("trace")
        ['rank-00000.json']
    """
    rank, folder = Ranks.of(parallel_context).rank, Path(directory)

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / f"rank-{rank:05d}.json"))

    activities = [ProfilerActivity.CPU]
    if parallel_context.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    steps = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
    return profile(activities=activities, schedule=steps, on_trace_ready=write, **options)
