"""Spreading requests for completions over several engines, of which some may die."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polyshard.adapters.vllm.clients.protocol import ABORTED, RolloutClient, SampleAnswer, SampleRequest
from polyshard.core.errors import ConfigurationError, EngineFailureError

logger = logging.getLogger(__name__)

IN_FLIGHT = 128  # requests at one engine
_LOSSES = 3  # engines that one request may lose before it is an error
_CHECK = 5.0  # seconds between two looks at an engine that has requests
# A continuation takes the tokens so far as its prompt, for which these would mean something else.
_NOT_CONTINUED = (
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "bad_words",
    "structured_outputs",
    "logits_processors",
)


@dataclass(eq=False)
class Job:
    """One completion that is to be sampled, possibly in several parts."""

    prompt: tuple[int, ...]
    sampling: Mapping[str, Any]
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[str, ...] = ()
    reason: str | None = None
    error: Exception | None = None
    returns_routing: bool = False
    routing: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of all tokens but the last
    losses: int = 0
    attempt: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        """Whether it has its answer or an error."""
        return self.reason is not None or self.error is not None

    def request(self) -> SampleRequest:
        """Return the request for what is missing."""
        done, sampling = len(self.tokens), dict(self.sampling)
        if done:
            for name in ("max_tokens", "min_tokens"):
                if sampling.get(name) is not None:
                    sampling[name] = max(0, sampling[name] - done)
            if sampling.get("seed") is not None:
                sampling["seed"] += done
        known = len(self.prompt) + done - 1 if done else 0  # tokens whose experts are known
        return SampleRequest(
            f"{uuid.uuid4().hex}", self.prompt + self.tokens, sampling, known if self.returns_routing else None
        )

    def take(self, answer: SampleAnswer) -> None:
        """Add an answer, which may be partial."""
        limit = self.sampling["max_tokens"]
        if answer.reason == ABORTED and any(self.sampling.get(name) for name in _NOT_CONTINUED):
            return  # sampled again from its beginning
        if self.returns_routing and answer.tokens:
            if answer.routing is None:
                raise ConfigurationError(
                    "a client returned no routing, although SampleRequest.routing_from requests it. Use HttpClient, "
                    "RayClient or LlmClient, or return SampleAnswer.routing."
                )
            self.routing = {
                name: torch.cat((self.routing[name], experts)) if self.routing else experts
                for name, experts in answer.routing.items()
            }
        self.tokens += answer.tokens
        self.logprobs += answer.logprobs
        self.versions += answer.versions
        if answer.reason != ABORTED:
            self.reason = answer.reason
        elif limit is not None and len(self.tokens) >= limit:
            self.reason = "length"


class Dispatcher:
    """Hands out jobs to engines, each to the engine that has the fewest.

    A job whose engine dies is handed to another. Jobs that are interrupted keep their tokens, and go on after `resume`.

    Args:
        timeout: seconds after which a request without an answer means that its engine is frozen.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._changed = threading.Condition()
        self._clients: dict[str, RolloutClient] = {}
        self._running: dict[str, dict[Job, int]] = {}
        self._waiting: deque[Job] = deque()
        self._lost: dict[str, str] = {}
        self._paused = True
        self._versions: set[str] = set()  # of the weights that the trainer has sent
        self._closed = threading.Event()
        self._attempts = itertools.count(1)
        threading.Thread(target=self._watch, name="polyshard-rollouts", daemon=True).start()

    @property
    def engines(self) -> tuple[str, ...]:
        """The names of the engines that get jobs."""
        with self._changed:
            return tuple(self._clients)

    def add(self, client: RolloutClient) -> None:
        """Add an engine."""
        with self._changed:
            self._clients[client.name] = client
            self._running[client.name] = {}
            self._dispatch()

    def remove(self, name: str) -> None:
        """Remove an engine; its jobs are handed to others."""
        with self._changed:
            self._take_away(name)

    def take_lost(self) -> dict[str, str]:
        """Return the engines that were lost since the last call, with the reason."""
        with self._changed:
            lost, self._lost = self._lost, {}
            return lost

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs."""
        with self._changed:
            self._waiting.extend(jobs)
            self._dispatch()

    def wait(self, jobs: Sequence[Job]) -> bool:
        """Wait until the jobs have ended; return False if no engine is left before.

        Raises:
            Exception: the error of a job.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(job.ended for job in jobs) or not self._clients)
            for job in jobs:
                if job.error is not None:
                    raise job.error
            return all(job.ended for job in jobs)

    def interrupt(self) -> None:
        """Stop all engines. Jobs keep their tokens. An engine that does not stop in time is lost."""
        deadline = time.monotonic() + self._timeout
        with self._changed:
            self._paused = True
            while any(self._running.values()):
                busy = [self._clients[name] for name, jobs in self._running.items() if jobs]
                self._changed.release()
                try:
                    for client in busy:
                        self._guarded(client, lambda client=client: client.abort(client.unfinished()))
                finally:
                    self._changed.acquire()
                # Again after a while, for requests that were on their way.
                self._changed.wait_for(lambda: not any(self._running.values()), 0.1)
                if time.monotonic() > deadline:
                    for name in [name for name, jobs in self._running.items() if jobs]:
                        self._lose(name, f"its requests did not end within {self._timeout:g} s")

    def resume(self, version: str) -> None:
        """Hand out jobs again; engines may answer with tokens of this version of the weights, and of those before."""
        with self._changed:
            self._paused = False
            self._versions.add(version)
            self._dispatch()

    def close(self) -> None:
        """Forget all jobs."""
        self._closed.set()
        with self._changed:
            self._paused = True
            self._waiting.clear()
            self._changed.notify_all()

    def _dispatch(self) -> None:
        while self._waiting and self._clients and not self._paused:
            name = min(self._running, key=lambda engine: len(self._running[engine]))
            if len(self._running[name]) >= IN_FLIGHT:
                break
            job = self._waiting.popleft()
            job.attempt, job.started = next(self._attempts), time.monotonic()
            self._running[name][job] = job.attempt
            arguments = (self._clients[name], job, job.attempt, job.request())
            threading.Thread(target=self._work, args=arguments, name="polyshard-rollout", daemon=True).start()
        self._changed.notify_all()

    def _work(self, client: RolloutClient, job: Job, attempt: int, request: SampleRequest) -> None:
        error: Exception | None = None
        answer: SampleAnswer | None = None
        try:
            answer = client.generate(request)
        except Exception as problem:
            error = problem
        lost = isinstance(error, ConnectionError) or (isinstance(error, RuntimeError) and not client.is_reachable())
        with self._changed:
            if job.attempt != attempt:
                return  # the engine was given up, and another has the job
            self._running[client.name].pop(job)
            foreign = set(answer.versions) - self._versions if answer is not None else set()
            if foreign:
                lost, answer, error = True, None, _foreign(foreign)
            if answer is not None:
                try:
                    job.take(answer)
                except ConfigurationError as problem:
                    job.error = problem
            elif not lost:
                job.error = error
            if lost:
                self._give_back(job, f"{client.name}: {error}")
                self._lose(client.name, str(error))
            elif not job.ended:
                self._waiting.appendleft(job)
            self._dispatch()

    def _give_back(self, job: Job, reason: str) -> None:
        """Queue a job whose engine was lost."""
        job.attempt, job.losses = 0, job.losses + 1
        if job.losses < _LOSSES:
            self._waiting.appendleft(job)
        else:
            job.error = EngineFailureError(f"{job.losses} engines were lost while they sampled one prompt; {reason}")

    def _lose(self, name: str, reason: str) -> None:
        if name in self._clients:
            logger.warning("the engine %s is lost, and its requests go to others: %s", name, reason)
            self._lost[name] = reason
            self._take_away(name, reason)

    def _take_away(self, name: str, reason: str = "removed") -> None:
        if self._clients.pop(name, None) is not None:
            for job in self._running.pop(name):
                self._give_back(job, f"{name}: {reason}")
            self._dispatch()

    def _guarded(self, client: RolloutClient, action: Callable[[], Any]) -> None:
        try:
            action()
        except (ConnectionError, RuntimeError) as error:
            with self._changed:
                self._lose(client.name, str(error))

    def _watch(self) -> None:
        """Lose engines that do not answer, or whose requests take too long."""
        while not self._closed.wait(_CHECK):
            with self._changed:
                busy = [
                    (self._clients[name], min(j.started for j in jobs)) for name, jobs in self._running.items() if jobs
                ]
            for client, oldest in busy:
                late = time.monotonic() - oldest > self._timeout
                if late or not (client.is_reachable() or client.is_reachable()):
                    told = f"no completion within {self._timeout:g} s" if late else "it does not answer"
                    with self._changed:
                        self._lose(client.name, told)


def _foreign(versions: set[str]) -> EngineFailureError:
    """Return the error of an engine that serves weights which the trainer has not sent."""
    names = ", ".join(sorted(map(repr, versions)))
    return EngineFailureError(
        f"it serves weights {names}, which this trainer has not sent: the engine was restarted, or another trainer "
        "sends weights to it"
    )
