"""Agreement of the ranks on a fresh prefix for their keys in the store.

torchrun keeps one store over its restarts, with the keys of processes that are gone. A machine may come back with
processes that have not been there before, while others have initialized twice. So a rank cannot count; it announces
itself under a random name, and rank 0 answers with the names of all ranks and a new prefix.
"""

from __future__ import annotations

import json
import secrets
import time

import torch.distributed as dist

from polyshard.core.errors import RankFailureError

_FIRST, _LAST = 0.01, 0.3  # seconds between two looks at the store: growing, since thousands of ranks share it


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """Return a prefix that all ranks of this start have, and that no earlier one had. A collective.

    Raises:
        RankFailureError: a rank did not come within the timeout; it is named.
    """
    store = dist.PrefixStore("polyshard/start", store)
    name, deadline = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"name/{rank}", name)
    return _lead(store, world_size, deadline) if rank == 0 else _follow(store, rank, name, deadline)


def _lead(store: dist.Store, world_size: int, deadline: float) -> str:
    names: list[str | None] = []
    prefix, pause = "", _FIRST
    while True:
        found = [_read(store, f"name/{rank}") for rank in range(world_size)]
        if None not in found:
            if found != names:  # a rank of an earlier start was replaced by one of this start
                names, prefix = found, secrets.token_hex(8)
                store.set("answer", json.dumps({"prefix": prefix, "names": names}))
            seen = [store.check([f"seen/{prefix}/{rank}"]) for rank in range(1, world_size)]
            if all(seen):
                store.set(f"go/{prefix}", "1")
                return prefix
        else:
            seen = [name is not None for name in found[1:]]
        if time.monotonic() > deadline:
            raise _late(tuple(rank for rank, came in enumerate(seen, start=1) if not came))
        time.sleep(pause)
        pause = min(_LAST, 1.3 * pause)


def _follow(store: dist.Store, rank: int, name: str, deadline: float) -> str:
    seen, pause = "", _FIRST
    while True:
        answer = _read(store, "answer")
        if answer is not None:
            told = json.loads(answer)
            if rank < len(told["names"]) and told["names"][rank] == name:
                if told["prefix"] != seen:
                    seen = told["prefix"]
                    store.set(f"seen/{seen}/{rank}", "1")
                if store.check([f"go/{seen}"]):
                    return seen
        if time.monotonic() > deadline:
            raise _late((0,))
        time.sleep(pause)
        pause = min(_LAST, 1.3 * pause)


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _late(ranks: tuple[int, ...]) -> RankFailureError:
    shown = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
    return RankFailureError(
        f"initialize waited in vain for rank {shown}: it has not called initialize, crashed, hung, or cannot be "
        "reached.",
        ranks,
    )
