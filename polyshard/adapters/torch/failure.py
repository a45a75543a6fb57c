"""Identification of failed ranks, with heartbeats in the store of torchrun's agent (or of rank 0).

A thread of each rank writes a heartbeat every `INTERVAL` seconds, with the number of collectives that the rank has
entered on each axis. A backend's own error says little ("connection closed by peer", "timed out"). When one is raised,
the heartbeats show which rank crashed, hung or diverged.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from polyshard.adapters.torch.compat import is_communication_error
from polyshard.core.errors import RankFailureError

T = TypeVar("T")

logger = logging.getLogger(__name__)

INTERVAL = 0.5  # seconds between heartbeats
PATIENCE = 3.0  # seconds within which a live rank's heartbeat must change


def backend_timeout(timeout: float) -> float:
    """Return the backend's timeout, which leaves time for the diagnosis within `timeout` seconds."""
    return max(1.0, timeout - PATIENCE - 4 * INTERVAL)  # slack for a loaded machine


class RankMonitor:
    """Writes this rank's heartbeat, and identifies failed ranks. One per initialized context.

    Attributes:
        peers: the ranks of each axis of this rank, with which it shares the collectives of that axis. Pipeline stages
            run different numbers of them.

    Args:
        store: for heartbeats.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.peers: Mapping[str, tuple[int, ...]] = {}
        self._store, self._rank, self._world_size = store, rank, world_size
        self._entered: Counter[str] = Counter()
        self._operation = ""
        # The last error of the program, which the others may wait for, and the operation during which it was raised.
        # It is kept until a later operation on the same axis succeeds: the program may catch it and go on.
        self._raised = self._raised_in = ""
        self._stopping = threading.Event()
        self._beat("running")
        self._thread = threading.Thread(target=self._run, name="polyshard-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the heartbeat, and mark this rank as finished for the others."""
        self._stopping.set()
        self._thread.join(timeout=2 * INTERVAL)
        try:
            _in_time(lambda: self._beat("finished"), PATIENCE)
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            logger.debug("the store was gone at shutdown: %s", error)

    @contextmanager
    def guard(self, operation: str) -> Iterator[None]:
        """Count a collective, and convert a backend error in it to `RankFailureError`."""
        axis = operation.split(" ", 1)[0]
        self._entered[axis] += 1
        self._operation = operation
        started = time.monotonic()
        try:
            yield
            if self._raised_in.split(" ", 1)[0] == axis:
                self._raised = self._raised_in = ""
        except RankFailureError:
            raise
        except Exception as error:
            if not is_communication_error(error):
                self.report(error)
                raise
            raise self._diagnose(operation, axis, time.monotonic() - started, error) from error

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL):
            try:
                self._beat("running")
            except (dist.DistError, RuntimeError):
                return  # the store's process is gone, which the next collective reports

    def report(self, error: BaseException) -> None:
        """Tell the other ranks of an error at once; this rank may end before its next heartbeat."""
        self._raised, self._raised_in = f"{type(error).__name__}: {_first_line(error)}", self._operation
        try:
            _in_time(lambda: self._beat("running"), PATIENCE)
        except (dist.DistError, RuntimeError, TimeoutError) as gone:
            logger.debug("the store was gone after an error: %s", gone)

    def _beat(self, state: str) -> None:
        beat = {
            "time": time.time(),
            "state": state,
            "entered": dict(self._entered),
            "operation": self._operation,
            "raised": self._raised,
            "raised_in": self._raised_in,
        }
        self._store.set(str(self._rank), json.dumps(beat))

    def _read(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(str(rank)))

    def _diagnose(self, operation: str, axis: str, waited: float, error: Exception) -> RankFailureError:
        here = f"rank {self._rank}: {operation} failed after {waited:.1f} s at {_clock(time.time())}"
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            suspects, latest = _in_time(lambda: self._watch(others), PATIENCE + 2 * INTERVAL)
        except TimeoutError:
            return RankFailureError(
                f"{here}: the process that keeps the store (torchrun's agent, or rank 0) does not answer. It "
                f"hangs, its machine is down, or it cannot be reached; backend: {_first_line(error)}"
            )
        except (dist.DistError, RuntimeError) as gone:
            return RankFailureError(
                f"{here}: the process that keeps the store (torchrun's agent, or rank 0) is gone, or cannot be reached "
                f"({type(gone).__name__}); backend: {_first_line(error)}"
            )
        raised = {rank for rank in others if latest[rank]["raised"]}
        suspects |= {rank for rank in raised if latest[rank]["raised_in"] == latest[rank]["operation"]}
        suspects = suspects or raised
        if suspects:
            told = "; ".join(_describe(rank, latest[rank]) for rank in sorted(suspects))
            return RankFailureError(f"{here}: {told}; backend: {_first_line(error)}", tuple(sorted(suspects)))
        mine = self._entered[axis]
        behind = [rank for rank in others if latest[rank]["entered"].get(axis, 0) < mine]
        behind = [rank for rank in behind if rank in self.peers.get(axis, ())] or behind
        if behind:
            told = "; ".join(
                f"rank {rank} is alive but has entered {latest[rank]['entered'].get(axis, 0)} collectives on this "
                f"axis, this rank {mine} (its last one: {latest[rank]['operation'] or 'none'})"
                for rank in behind
            )
            return RankFailureError(f"{here}: {told}; backend: {_first_line(error)}", tuple(behind))
        return RankFailureError(f"{here}: all ranks are alive; backend: {_first_line(error)}")

    def _watch(self, others: list[int]) -> tuple[set[int], dict[int, dict[str, Any]]]:
        """Return the ranks whose heartbeat has stopped, and the last heartbeat of each rank."""
        before = {rank: self._read(rank) for rank in others}
        suspects = set(others)
        deadline = time.monotonic() + PATIENCE
        latest = dict(before)
        while suspects and time.monotonic() < deadline:
            time.sleep(INTERVAL / 2)
            for rank in tuple(suspects):
                latest[rank] = self._read(rank)
                if latest[rank]["time"] != before[rank]["time"] and latest[rank]["state"] == "running":
                    suspects.discard(rank)
        return suspects, latest


def _in_time(action: Callable[[], T], seconds: float) -> T:
    """Return the action's result or raise TimeoutError: a store whose process hangs ignores its own timeout."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="polyshard-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds} s")
    return results[0]


def _describe(rank: int, beat: dict[str, Any]) -> str:
    last = f"last heartbeat at {_clock(beat['time'])}, {max(0.0, time.time() - beat['time']):.1f} s ago"
    if beat["raised"]:
        return f"rank {rank} raised {beat['raised']} ({last}, in {beat['raised_in'] or 'no collective yet'})"
    if beat["state"] == "finished":
        return f"rank {rank} had shut down ({last})"
    return f"rank {rank} crashed, hung, or cannot be reached ({last}, in {beat['operation'] or 'no collective yet'})"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{int(seconds % 1 * 1000):03d}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
