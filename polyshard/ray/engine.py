"""A vLLM engine in a Ray actor, and its client."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyshard.adapters.vllm.clients.protocol import SampleAnswer, SampleRequest
from polyshard.core.errors import ConfigurationError
from polyshard.ray.requirement import REQUIREMENT
from polyshard.registry import ENVIRONMENT_VARIABLE, engine_errors

logger = logging.getLogger(__name__)

_CONCURRENCY = 256  # calls that an engine handles at once: requests wait in it
_PING = 5.0  # seconds


class Engine:
    """The actor: a vLLM engine in this process. Its tensor-parallel workers, if any, are child processes."""

    def __init__(self, directory: str, architecture: str | None, name: str, options: Mapping[str, Any]) -> None:
        from polyshard.adapters.vllm.clients.local import LlmClient
        from polyshard.adapters.vllm.clients.protocol import BACKEND
        from polyshard.adapters.vllm.engines.start import DEFAULTS, start_colocated

        settings = {**DEFAULTS, "weight_transfer_config": {"backend": BACKEND}, **options}
        with engine_errors():
            self._llm = start_colocated(directory, architecture, 1, settings)
        self._client = LlmClient(self._llm, name)

    def host(self) -> str:
        """Return the address of this actor's machine."""
        import ray

        return ray.util.get_node_ip_address()

    def pid(self) -> int:
        """Return the ID of this process."""
        return os.getpid()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine's client."""
        return getattr(self._client, method)(*arguments)


class RayClient:
    """The client of an engine in a Ray actor. It may be passed to other actors.

    Args:
        actor: the actor that `ray_engine` has created.
        name: the engine's name, for messages.
        timeout: seconds after which a call without an answer means that the engine is frozen.

    Examples:
        >>> client = ps.ray_engine("model", "MyModel", name="first")  # needs Ray and vLLM  # doctest: +SKIP
        >>> sync = ps.WeightSync(trainer, context, client)  # needs Ray and vLLM  # doctest: +SKIP
    """

    def __init__(self, actor: Any, name: str, timeout: float = 600.0) -> None:
        self.name = name
        self.actor = actor
        self._timeout = timeout

    @property
    def host(self) -> str:
        """The address of the machine on which the actor runs; Ray may restart it on another."""
        return self._get(self.actor.host.remote(), self._timeout)

    def call(self, method: str, payload: Mapping[str, Any] | None) -> None:
        """Call one of vLLM's weight-transfer methods on every worker, and wait for it."""
        self._call("call", method, payload)

    def unfinished(self) -> list[str]:
        """Return the IDs of the engine's unfinished requests."""
        return self._call("unfinished")

    def abort(self, requests: list[str]) -> None:
        """Abort requests; calls of `generate` that wait for them return what they have."""
        self._call("abort", requests)

    def forget_cached(self, version: str) -> bool:
        """Reset the prefix cache, and set the weight version."""
        return self._call("forget_cached", version)

    def generate(self, request: SampleRequest) -> SampleAnswer:
        """Sample one completion, and wait for it.

        Raises:
            ConnectionError: the engine died, or cannot be reached.
        """
        return self._call("generate", request)

    def is_reachable(self) -> bool:
        """Whether the actor answers; not while Ray restarts it."""
        try:
            return self._get(self.actor.call.remote("is_reachable"), _PING)
        except ConnectionError:
            return False

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._get(self.actor.call.remote(method, *arguments), self._timeout)

    def _get(self, reference: Any, timeout: float) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=timeout)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            told = str(error).strip().splitlines() or [""]
            # Of an engine that could not be created, the last line is the reason.
            reason = told[-1] if "creation task" in told[0] else told[0]
            raise ConnectionError(
                f"{self.name} died, froze, or cannot be reached ({type(error).__name__}: {reason})"
            ) from error


def ray_engine(
    directory: str | Path,
    architecture: str | None = None,
    *,
    name: str = "engine",
    resources: Mapping[str, float] | None = None,
    max_restarts: int = -1,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    scheduling: Any = None,
    **options: Any,
) -> RayClient:
    """Start a vLLM engine in a Ray actor. Return at once: the engine's first answer waits for it.

    If the actor dies, Ray starts another, which serves the directory's weights until the next sync.

    Args:
        directory: a Hugging Face directory of the model, on every machine on which the actor may run.
        architecture: name of a registered model; by default the checkpoint's.
        name: the engine's name, for messages.
        resources: what Ray reserves: `{"GPU": 1}`. By default one CPU. At tensor-parallel sizes above 1 the actor needs
            all GPUs, which must be on one machine.
        max_restarts: how often Ray restarts the actor; -1 without limit.
        environment: environment variables of the actor. Registered models are passed on.
        timeout: seconds after which a call without an answer means that the engine is frozen.
        scheduling: a scheduling strategy of Ray, such as a place in a placement group.
        options: arguments of `vllm.LLM`. By default the engine runs eagerly and without a tokenizer.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigurationError: Ray has not been initialized, or an argument is invalid.

    Examples:
        >>> client = ray_engine("model", "MyModel", resources={"GPU": 1})  # needs Ray and vLLM  # doctest: +SKIP
    """
    needs = checked_resources(resources)
    given = checked_environment(environment)
    if isinstance(max_restarts, bool) or not isinstance(max_restarts, int) or max_restarts < -1:
        raise ConfigurationError(f"max_restarts is invalid: got {max_restarts!r}, expected -1, 0 or more.")
    ray = require_ray()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(machine.get(what, 0) >= amount for what, amount in needs.items()) for machine in machines):
        logger.warning("no machine of the Ray cluster has %s: the engine %s waits for one", needs, name)
    models = os.environ.get(ENVIRONMENT_VARIABLE)
    variables = {**({} if models is None else {ENVIRONMENT_VARIABLE: models}), **given}
    actor = (
        ray.remote(Engine)
        .options(
            **actor_options(needs),
            max_concurrency=_CONCURRENCY,
            max_restarts=max_restarts,
            runtime_env={"env_vars": variables},
            scheduling_strategy=scheduling or "DEFAULT",
        )
        .remote(str(directory), architecture, name, options)
    )
    return RayClient(actor, name, timeout)


def require_ray() -> Any:
    """Return the `ray` module.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigurationError: Ray has not been initialized.
    """
    REQUIREMENT.require()
    import ray

    if not ray.is_initialized():
        raise ConfigurationError("Ray has not been initialized. Call ray.init() first.")
    return ray


def checked_resources(resources: Any) -> dict[str, float]:
    """Return what Ray reserves, one CPU by default.

    Raises:
        ConfigurationError: it is not a mapping from names to numbers, of which at least one is positive.
    """
    needs = {"CPU": 1} if resources is None else resources
    valid = isinstance(needs, Mapping) and all(
        isinstance(name, str) and isinstance(amount, (int, float)) and 0 <= amount < math.inf
        for name, amount in needs.items()
    )
    if not valid or not any(needs.values()):
        raise ConfigurationError(
            f"resources is invalid: got {resources!r}, expected positive numbers by name, such as {{'GPU': 1}}."
        )
    return dict(needs)


def checked_environment(environment: Any) -> dict[str, str]:
    """Return environment variables.

    Raises:
        ConfigurationError: it is not a mapping from strings to strings.
    """
    given = {} if environment is None else environment
    if not isinstance(given, Mapping) or not all(isinstance(text, str) for item in given.items() for text in item):
        raise ConfigurationError(f"environment is invalid: got {environment!r}, expected strings by name.")
    return dict(given)


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Return resources as options of an actor."""
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0), "resources": others}
