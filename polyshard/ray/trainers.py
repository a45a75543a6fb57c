"""The ranks of a job as Ray actors, with torchrun's environment variables."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal, get_args

import torch.distributed as dist

from polyshard.core.errors import ConfigurationError, RankFailureError
from polyshard.ray.engine import actor_options, checked_environment, checked_resources, require_ray
from polyshard.registry import ENVIRONMENT_VARIABLE

logger = logging.getLogger(__name__)

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class Rank:
    """The actor: one rank of the job."""

    def run(self, variables: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Set the environment variables, and call the function."""
        os.environ.update(variables)
        return function(*arguments)


def run_on_ray(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    resources: Mapping[str, float] | None = None,
    strategy: Strategy = "PACK",
    restarts: int = 0,
    environment: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> list[Any]:
    """Call `function(*arguments)` on ranks that are Ray actors, as torchrun does with a script.

    `polyshard.initialize` finds the job's size and this process's rank in the environment. The calling process keeps
    the store at which the ranks meet. If a rank dies, all actors are replaced and the function is called again: it
    must continue from its last training state (`polyshard.latest_checkpoint`). Errors of the function itself are
    raised.

    Args:
        function: the function.
        ranks: number of ranks.
        arguments: its arguments, such as clients of engines.
        resources: what Ray reserves for each rank: `{"GPU": 1}`. By default one CPU.
        strategy: strategy of the placement group: `PACK`, `SPREAD`, `STRICT_PACK` or `STRICT_SPREAD`.
        restarts: how often the ranks are replaced.
        environment: environment variables of the ranks. Registered models are passed on.
        timeout: seconds to wait for the resources.

    Returns:
        The result of each rank.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigurationError: Ray has not been initialized, or does not have the resources; or an argument is invalid.
        RankFailureError: a rank died more than `restarts` times.

    Examples:
        >>> losses = run_on_ray(train, 2, "runs/1", restarts=3)  # needs Ray  # doctest: +SKIP
    """
    if not callable(function):
        raise ConfigurationError(f"function is invalid: got {function!r}, expected a function.")
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ConfigurationError(f"ranks is invalid: got {ranks!r}, expected a positive integer.")
    if strategy not in get_args(Strategy):
        raise ConfigurationError(
            f"strategy is unknown: got {strategy!r}, expected one of {', '.join(get_args(Strategy))}."
        )
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise ConfigurationError(f"restarts is invalid: got {restarts!r}, expected 0 or a positive integer.")
    needs = checked_resources(resources)
    variables = checked_environment(environment)
    ray = require_ray()
    for left in range(restarts, -1, -1):
        try:
            return _run_once(ray, function, ranks, arguments, needs, strategy, variables, timeout)
        except RankFailureError as error:
            if left == 0:
                raise
            logger.warning("%s. All ranks are replaced, %d restarts left", error, left)
    raise AssertionError("unreachable")


def _run_once(
    ray: Any,
    function: Callable[..., Any],
    ranks: int,
    arguments: tuple[Any, ...],
    resources: dict[str, float],
    strategy: Strategy,
    environment: Mapping[str, str],
    timeout: float,
) -> list[Any]:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.placement_group([resources] * ranks, strategy=strategy)
    actors: list[Any] = []
    try:
        _await_resources(ray, group, resources, ranks, timeout)
        # Kept by this process, as by torchrun's agent: it outlives any rank, and the system chooses a free port.
        store = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)
        models = os.environ.get(ENVIRONMENT_VARIABLE)
        shared = {
            **({} if models is None else {ENVIRONMENT_VARIABLE: models}),
            **environment,
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": "0",  # Ray shows each actor its own GPUs only
            "MASTER_ADDR": ray.util.get_node_ip_address(),
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        # Before the actor's process starts, for libraries that read theirs when they are imported.
        settings = {**actor_options(resources), "runtime_env": {"env_vars": dict(environment)}}
        for rank in range(ranks):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            actors.append(ray.remote(Rank).options(scheduling_strategy=place, **settings).remote())
        calls = [
            actor.run.remote({**shared, "RANK": str(rank)}, function, arguments) for rank, actor in enumerate(actors)
        ]
        return _results(ray, calls)
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.util.remove_placement_group(group)


def _results(ray: Any, calls: list[Any]) -> list[Any]:
    """Return the results, or raise the first error; if an actor died, `RankFailureError`."""
    waiting = list(calls)
    while waiting:
        (done,), waiting = ray.wait(waiting, num_returns=1)
        try:
            ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except ray.exceptions.UnserializableException as error:
            told = str(error).strip().splitlines()
            raise RuntimeError(
                f"rank {calls.index(done)} raised an exception that cannot be sent to this process: {told[-1]}"
            ) from error
        except ray.exceptions.RayError as error:
            rank = calls.index(done)
            told = " ".join(str(error).split())[:300]
            raise RankFailureError(f"rank {rank} died: {type(error).__name__}: {told}", (rank,)) from error
    return ray.get(calls)


def _await_resources(ray: Any, group: Any, resources: Mapping[str, float], ranks: int, timeout: float) -> None:
    try:
        ray.get(group.ready(), timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        nodes = [f"{node['NodeManagerAddress']}: {node['Resources']}" for node in ray.nodes() if node["Alive"]]
        raise ConfigurationError(
            f"Ray does not have the resources for {ranks} ranks with {dict(resources)} each after {timeout:g} s. "
            f"Machines: {'; '.join(nodes)}. Free now: {ray.available_resources()}."
        ) from None
