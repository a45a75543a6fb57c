"""Random numbers of an engine that runs in the trainer's processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from polyshard.core.ranks import Ranks


@contextmanager
def same_draws(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Let torch's generators draw the same numbers on all ranks, and restore them afterwards. A collective.

    Each rank of a colocated engine samples for itself. The generators of a trainer's ranks differ, for dropout and
    since sharded weights take different numbers of draws, so the ranks would sample different tokens.

    Args:
        ranks: all ranks of the engine.
        device: the device on which tokens are sampled.
    """
    seed = ranks.broadcast(int(torch.randint(2**63 - 1, ()).item()))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
