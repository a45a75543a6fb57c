"""The client of a `vllm.LLM` object in this process, whose workers run in it or in its children."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.clients.protocol import ABORTED, BACKEND, SampleAnswer, SampleRequest, token_versions
from polyshard.adapters.vllm.engines.rollout import check_known, refuse_chunked_seeds
from polyshard.adapters.vllm.engines.routing import served_routing
from polyshard.adapters.vllm.transfer.local import abandoned_if_failed
from polyshard.core.errors import ConfigurationError


class LlmClient:
    """The client of a `vllm.LLM` object.

    One thread steps the engine while requests are unfinished, so that `generate` may be called from several threads.

    Args:
        llm: the engine, started with `weight_transfer_config={"backend": "polyshard"}`.
        name: the engine's name, for messages.

    Raises:
        ConfigurationError: the engine was started without the weight transfer backend.

    Examples:
        >>> client = LlmClient(llm, "first")  # needs vLLM  # doctest: +SKIP
        >>> sync = ps.WeightSync(trainer, context, client)  # needs vLLM  # doctest: +SKIP
    """

    host = "127.0.0.1"

    def __init__(self, llm: Any, name: str = "engine") -> None:
        config = llm.llm_engine.vllm_config.weight_transfer_config
        if config is None or config.backend != BACKEND:
            raise ConfigurationError(
                f"{name} was started with weight_transfer_config={config!r}. Start it with "
                f"LLM(..., weight_transfer_config={{'backend': '{BACKEND}'}})"
            )
        self.name = name
        self._llm = llm
        self._changed = threading.Condition()
        self._callers = 0  # threads that want the engine between two steps
        self._waiting: dict[str, Future[SampleAnswer]] = {}
        self._latest: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._version = ""

    def call(self, method: str, payload: Mapping[str, Any] | None) -> None:
        """Call the method through vLLM's `collective_rpc`."""
        with self._between_steps():
            self._llm.llm_engine.collective_rpc(method, kwargs=dict(payload or {}))

    def unfinished(self) -> list[str]:
        """Return the IDs of the unfinished requests that this process has sent."""
        return compat.unfinished_requests(self._llm)

    def abort(self, requests: list[str]) -> None:
        """Abort requests; calls of `generate` that wait for them return what they have."""
        with self._between_steps():
            self._llm.llm_engine.abort_request(requests, internal=True)
            for name in list(self._waiting):
                if any(request == name or request.startswith(f"{name}-") for request in requests):
                    self._settle(name, ABORTED)

    def forget_cached(self, version: str) -> bool:
        """Reset the prefix cache and the connectors' caches, and set the weight version."""
        with self._between_steps():
            self._version = version
            self._llm.llm_engine.set_weight_version(version)
            return compat.reset_caches(self._llm)

    def generate(self, request: SampleRequest) -> SampleAnswer:
        """Sample one completion, and wait for it.

        Raises:
            ConnectionError: the engine died.
            ConfigurationError: a sampling parameter is unknown, or the engine keeps no routing.
        """
        from vllm import SamplingParams

        check_known(request.sampling)
        refuse_chunked_seeds(self._llm, request.sampling, [request.prompt], 1)
        sampling: dict[str, Any] = {**request.sampling, "n": 1, "logprobs": 0, "detokenize": False}
        parameters = SamplingParams(**sampling)
        future: Future[SampleAnswer] = Future()
        with self._between_steps():
            self._llm.llm_engine.add_request(request.id, {"prompt_token_ids": list(request.prompt)}, parameters)
            self._waiting[request.id] = future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"polyshard-{self.name}", daemon=True)
                self._thread.start()
            self._changed.notify()
        answer = future.result()
        if request.routing_from is None or not answer.tokens:
            return answer
        sequence = [*request.prompt, *answer.tokens]
        try:
            with self._between_steps():
                (routing,) = served_routing(self._llm, [sequence], [request.routing_from])
        except Exception as error:
            if isinstance(error, ConfigurationError) or self.is_reachable():
                raise
            raise ConnectionError(f"{self.name} died: {type(error).__name__}: {error}") from error
        return replace(answer, routing=routing)

    def is_reachable(self) -> bool:
        """Whether the engine's processes are alive."""
        return not compat.engine_is_dead(self._llm)

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Hold the engine, which no other thread then steps or calls.

        Raises:
            ConnectionError: the engine died while another thread waits for its answer, which vLLM lets it do for ever.
        """
        self._callers += 1  # a hint: the engine's thread looks at it, and nothing depends on its value
        try:
            while not self._changed.acquire(timeout=1.0):
                if not self.is_reachable():
                    raise ConnectionError(f"{self.name} died, and has not answered an earlier call")
            try:
                yield
            finally:
                self._changed.release()
        finally:
            self._callers -= 1

    def _run(self) -> None:
        """Step the engine while requests are unfinished."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                try:
                    with compat.raises_if_engine_dies(self._llm), abandoned_if_failed(self._llm):
                        self._step()
                except Exception as error:
                    self._lose(ConnectionError(f"{self.name} died: {type(error).__name__}: {error}"))
            if self._callers > 0:
                time.sleep(0.0002)  # a lock is not fair: let the other threads in

    def _lose(self, error: ConnectionError) -> None:
        for future in self._waiting.values():
            future.set_exception(error)
        self._waiting.clear()
        self._latest.clear()

    def _step(self) -> None:
        for output in self._llm.llm_engine.step():
            self._latest[output.request_id] = output
            if output.finished and output.request_id in self._waiting:
                self._settle(output.request_id, output.outputs[0].finish_reason)

    def _settle(self, name: str, reason: str) -> None:
        future, output = self._waiting.pop(name), self._latest.pop(name, None)
        if output is None:
            future.set_result(SampleAnswer((), (), (), reason))
            return
        answer = output.outputs[0]
        tokens = tuple(answer.token_ids)
        logprobs = tuple(step[token].logprob for step, token in zip(answer.logprobs, tokens))
        versions = token_versions(len(tokens), getattr(answer, "weight_versions", None), self._version)
        future.set_result(SampleAnswer(tokens, logprobs, versions, reason))
