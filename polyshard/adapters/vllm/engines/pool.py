"""Several engines that run anywhere, behind one `RolloutEngine`: they share the prompts, and may come and go."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from polyshard.adapters.vllm.clients.protocol import RolloutClient
from polyshard.adapters.vllm.engines.dispatcher import Dispatcher, Job
from polyshard.adapters.vllm.engines.rollout import Rollout
from polyshard.adapters.vllm.transfer.report import SyncReport
from polyshard.adapters.vllm.transfer.sync import WeightSync
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, EngineFailureError, WeightSyncError
from polyshard.core.ranks import Ranks
from polyshard.core.waiting import run_in_step
from polyshard.weights.view import view_weights

logger = logging.getLogger(__name__)

Batch = list[list[Job]]

# An engine that failed a sync is tried again: a worker may still wait for the connection that was lost.
_PATIENCE, _LEAST = 5, 120.0  # timeouts, and seconds at least, after which one that fails each sync is given up


class EnginePool:
    """The engines of a `RolloutEngine`, which others have started. Every trainer rank creates one.

    The first rank calls the engines; the others wait in step. An engine that is lost gets no prompts. It is tried again
    at each sync, and after a sync it takes part again. If no engine is left, the call waits for one to come back. An
    engine that can be reached, but fails each sync for five timeouts (and two minutes at least), is given up.

    Args:
        clients: the engines.
        trainer: a training engine, or a model that its factory built.
        parallel_context: the context that the model was built with.
        timeout: seconds until an engine that does not answer is lost, and for which a call without engines waits.
        interface: see `WeightSync`.
        return_routing: return the experts that tokens took.
    """

    def __init__(
        self,
        clients: Sequence[RolloutClient],
        trainer: Any,
        parallel_context: ParallelContext,
        timeout: float,
        interface: str | None,
        return_routing: bool = False,
    ) -> None:
        self._ranks = Ranks.of(parallel_context)
        self._timeout, self._returns_routing = timeout, return_routing
        self._clients = {client.name: client for client in clients}
        self._away: dict[str, str] = {}  # engines that are lost, and why
        self._failing: dict[str, float] = {}  # when engines that fail each sync did so first
        self._given_up: set[str] = set()
        self._sync = WeightSync(trainer, parallel_context, list(clients), timeout=timeout, interface=interface)
        self._dispatcher = Dispatcher(timeout) if self._ranks.rank == 0 else None
        self._batches: deque[Batch] = deque()
        self._changes = view_weights(trainer, parallel_context).changes
        self._version: str | None = None
        self._synced = 0  # the count of changes at the last sync
        self.returned = 0

    def generate(self, prompts: Sequence[Sequence[int]], samples: int, sampling: dict[str, Any]) -> list[list[Rollout]]:
        """Sample completions of each prompt, and wait for them."""
        batch = self._submitted(prompts, samples, sampling)
        return self._collected(batch)

    def submit(self, prompts: Sequence[Sequence[int]], samples: int, sampling: dict[str, Any]) -> None:
        """Begin to sample completions of each prompt."""
        self._batches.append(self._submitted(prompts, samples, sampling))

    def collect(self) -> list[list[Rollout]]:
        """Wait for the batch that was submitted first."""
        if not self._batches:
            raise ConfigurationError("nothing has been submitted. Call submit first.")
        return self._collected(self._batches.popleft())

    def sync(self, version: str) -> SyncReport:
        """Interrupt all engines, send the weights, and go on with the completions that were interrupted.

        Requests of others in an engine that takes part for the first time are aborted.

        Raises:
            EngineFailureError: no engine is left.
            WeightSyncError: engines can be reached, but none took the weights.
        """
        dispatcher = self._dispatcher
        self._on_first(lambda: dispatcher.interrupt() if dispatcher else None)
        self._note_lost()
        self._readmit()
        self._on_first(lambda: self._abort_leftovers(dispatcher) if dispatcher else None)
        while True:
            if not self._sync.engines:
                self._await_engine()
            try:
                report = self._sync(version)
                break
            except WeightSyncError as error:
                if not error.engines:
                    raise
                late = self._late(error.engines)
                if late >= set(self._sync.engines):
                    raise
                self._send_away({name: str(error) for name in error.engines}, late)
        for name in self._sync.engines:
            self._failing.pop(name, None)
        self._version, self._synced = version, self._changes()
        if dispatcher is not None:
            for name in self._sync.engines:
                if name not in dispatcher.engines:
                    dispatcher.add(self._clients[name])
            dispatcher.resume(version)
        return report

    def join(self, client: RolloutClient) -> None:
        """Add an engine, which takes part after the next sync."""
        self._sync.join(client)
        self._clients[client.name] = client
        self._forget(client.name)

    def leave(self, name: str) -> None:
        """Remove an engine; what it has not finished is sampled by others."""
        known = self._ranks.broadcast(name in self._clients)
        if not known:
            raise ConfigurationError(f"there is no engine {name!r}: expected one of {', '.join(self._clients)}.")
        self._clients.pop(name, None)
        if name in self._sync.engines:
            self._sync.leave(name)
        self._forget(name)
        if self._dispatcher is not None:
            self._dispatcher.remove(name)

    def close(self) -> None:
        """Close all connections; the engines go on."""
        if self._dispatcher is not None:
            self._dispatcher.close()
        self._sync.close()

    def _submitted(self, prompts: Sequence[Sequence[int]], samples: int, sampling: dict[str, Any]) -> Batch:
        if self._version is None:
            raise ConfigurationError("the engines have no weights of this trainer. Call sync first.")
        if self._dispatcher is None:
            return []
        seed = sampling.get("seed")
        batch: Batch = []
        for prompt in prompts:
            own = [
                {"max_tokens": 16, **sampling, **({} if seed is None else {"seed": seed + i})} for i in range(samples)
            ]
            batch.append([Job(tuple(prompt), settings, returns_routing=self._returns_routing) for settings in own])
        self._dispatcher.submit([job for jobs in batch for job in jobs])
        return batch

    def _collected(self, batch: Batch) -> list[list[Rollout]]:
        jobs = [job for group in batch for job in group]
        dispatcher = self._dispatcher
        while not self._on_first(lambda: dispatcher.wait(jobs) if dispatcher else None):
            # No engine is left: wait for one, and give it the weights.
            assert self._version is not None
            self.sync(self._version if self._changes() == self._synced else f"{self._version}+")
        return self._ranks.broadcast([[_rollout(job) for job in group] for group in batch])

    def _abort_leftovers(self, dispatcher: Dispatcher) -> None:
        """Abort the requests that a trainer which died has left in engines that this one has not used yet."""
        for name in self._sync.engines:
            if name not in dispatcher.engines:
                client = self._clients[name]
                with contextlib.suppress(ConnectionError, RuntimeError):  # the sync reports it
                    client.abort(client.unfinished())

    def _note_lost(self) -> None:
        """Tell all ranks which engines the first rank has lost."""
        lost = self._ranks.broadcast(self._dispatcher.take_lost() if self._dispatcher else None)
        self._send_away({name: reason for name, reason in lost.items() if name in self._sync.engines})

    def _late(self, failed: Sequence[str]) -> set[str]:
        """Return which of the engines that failed a sync have failed each one for too long; the same on all ranks."""
        now = time.monotonic()
        patience = max(_LEAST, _PATIENCE * self._timeout)
        return self._ranks.broadcast({n for n in failed if now - self._failing.setdefault(n, now) > patience})

    def _forget(self, name: str) -> None:
        self._away.pop(name, None)
        self._failing.pop(name, None)
        self._given_up.discard(name)

    def _send_away(self, lost: dict[str, str], given_up: Collection[str] = ()) -> None:
        for name, reason in lost.items():
            if name in given_up:
                self._given_up.add(name)
                until = "has failed each sync, and gets no weights until it leaves and joins again"
            else:
                until = "gets no weights until it can be reached again"
            if self._ranks.rank == 0:
                logger.warning("the engine %s %s: %s", name, until, reason)
            self._sync.leave(name)
            self._away[name] = reason
            if self._dispatcher is not None:
                self._dispatcher.remove(name)

    def _readmit(self) -> None:
        """Let engines that can be reached again take part in the sync."""
        away = sorted(self._away.keys() - self._given_up)
        if not away:
            return
        back: list[str] = self._on_first(lambda: [name for name in away if self._clients[name].is_reachable()]) or []
        self._sync.join(*[self._clients[name] for name in back if name in self._clients])
        for name in away:
            if name in back:
                self._away.pop(name)
            else:
                self._failing.pop(name, None)  # it may come back as another process
        self.returned += len(back)

    def _await_engine(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._sync.engines:
            self._readmit()
            hopeless = self._away.keys() <= self._given_up
            if self._ranks.broadcast(not self._sync.engines and (hopeless or time.monotonic() > deadline)):
                names = tuple(sorted(self._away))
                reasons = "; ".join(f"{name}: {self._away[name]}" for name in names)
                why = "Join engines" if hopeless else f"None came back within {self._timeout:g} s"
                raise EngineFailureError(
                    f"no engine can be reached: {', '.join(names) or 'none was given'}. {why}. {reasons}".rstrip(),
                    names,
                )
            time.sleep(0.5)

    def _on_first(self, action: Any) -> Any:
        """Run an action on the first rank, while the others wait in step, and return its result on all ranks."""
        first = self._ranks.rank == 0
        return self._ranks.broadcast(
            run_in_step(self._ranks, lambda: action() if first else None, "the rollouts failed", EngineFailureError)
        )


def _rollout(job: Job) -> Rollout:
    return Rollout(
        prompt=job.prompt,
        tokens=job.tokens,
        logprobs=job.logprobs,
        finished=job.reason == "stop",
        version=job.versions[-1],
        versions=job.versions,
        routing=job.routing if job.returns_routing else None,
    )
