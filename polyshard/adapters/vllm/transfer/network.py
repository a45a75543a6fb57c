"""The network leg of `WeightSync`: engines on any machine, each over a process group of its own.

Every trainer rank sends to every worker what that worker keeps of it. The first trainer rank alone calls the engines.
Each phase runs for all engines at once. Its outcome is exchanged before the next begins, so that every rank knows of an
engine that failed before it waits for it, and the other engines go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from polyshard.adapters.vllm.clients.protocol import Client
from polyshard.adapters.vllm.transfer.link import CHUNK_BYTES, Link, first_line, local_address, make_store, open_store
from polyshard.adapters.vllm.transfer.network_engine import NetworkEngine
from polyshard.adapters.vllm.transfer.network_sender import NetworkSender, check_names, held_regions
from polyshard.core.computation import Computation, check_same_computation, merged
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError, PolyshardError, WeightSyncError
from polyshard.core.exact_identity import ExactIdentity, check_same_mode, identity_of
from polyshard.core.ranks import Ranks
from polyshard.core.waiting import run_in_step, run_within
from polyshard.weights.transfers import Need
from polyshard.weights.view import WeightView

Phase = Callable[[NetworkEngine], None]
Failures = dict[str, list[tuple[int, str]]]  # by engine: rank and message


class NetworkLeg:
    """The engines that a trainer reaches over the network. Every trainer rank creates one.

    Args:
        view: the trainer's weights.
        parallel_context: the context that the model was built with.
        shapes: full shape of each stored tensor that this rank's part of the model has.
        computation: what the layers of the whole model compute with.
        timeout: seconds after which an engine that does not answer, or a message that is not received, is an error.
        interface: network interface or address of this rank; see `local_address`.
        chunk_bytes: size of a message.
    """

    def __init__(
        self,
        view: WeightView,
        parallel_context: ParallelContext,
        shapes: Mapping[str, tuple[int, ...]],
        computation: Computation,
        timeout: float,
        interface: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._view, self._context, self._computation = view, parallel_context, computation
        self._ranks, self._axis = Ranks.of(parallel_context), parallel_context.axis("tensor")
        self._timeout, self._interface, self._chunk_bytes = timeout, interface, chunk_bytes
        self._engines: list[NetworkEngine] = []
        self._update = 0
        self.dtype: torch.dtype | None = None  # of the engine that was connected last
        self._own, self._shapes = self._responsibilities(shapes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the engines."""
        return tuple(engine.name for engine in self._engines)

    def join(self, clients: Sequence[Client]) -> None:
        """Add engines, which the next sync connects. A collective; only the first rank's clients are called.

        Raises:
            ConfigurationError: two engines have one name.
        """
        names: list[str] = self._ranks.broadcast([client.name for client in clients])
        twice = [name for name in names if (*self.names, *names).count(name) > 1]
        if twice:
            raise ConfigurationError(f"two engines have the same name: {twice[0]!r}. Give each client its own name.")
        own = {client.name: client for client in clients} if self._ranks.rank == 0 else {}
        self._engines += [NetworkEngine(name, own.get(name), self._timeout) for name in names]

    def leave(self, name: str) -> None:
        """Remove an engine, which keeps its weights. Every rank must call it.

        Raises:
            ConfigurationError: there is no engine of this name.
        """
        if name not in self.names:
            raise ConfigurationError(f"there is no engine {name!r}: expected one of {', '.join(self.names) or 'none'}.")
        self._engines = [engine for engine in self._engines if engine.name != name]

    def close(self) -> None:
        """Close all connections; the engines keep their weights."""
        for engine in self._engines:
            engine.drop()

    def send(self, version: str) -> None:
        """Send the current weights to all engines. A collective.

        Raises:
            WeightSyncError: an engine failed. All others hold the new weights. `engines` names those that failed.
            RankFailureError: a trainer rank died.
        """
        self._update += 1
        failures: Failures = {}
        phases: list[tuple[Phase, bool]] = [
            (self._require_idle, False),
            (self._announce, True),
            (self._plan, True),
            (self._connect, True),
            (self._begin, False),
            (partial(self._transfer, version=version), False),
            (partial(self._finish, version=version), False),
        ]
        fresh = {engine.name for engine in self._engines if engine.sender is None}
        try:
            for action, only_fresh in phases:
                active = [e for e in self._engines if e.name not in failures and (e.name in fresh or not only_fresh)]
                self._run(action, active, failures)
                if action == self._announce:
                    self._share_addresses(active)
                elif action == self._plan and active:
                    self._require_different(active)
        finally:
            for engine in self._engines:
                if engine.name in failures:
                    engine.drop()
        if failures:
            told = [f"{name}: {_told(errors)}" for name, errors in sorted(failures.items())]
            raise WeightSyncError(f"sync failed: {'; '.join(told)}", engines=tuple(sorted(failures)))

    def _run(
        self,
        action: Callable[[NetworkEngine], None],
        active: Sequence[NetworkEngine],
        failures: dict[str, list[tuple[int, str]]],
    ) -> None:
        """Run one phase for all engines at once, and add the errors of all ranks to `failures`."""
        if not active:
            return

        def all_engines() -> dict[str, str]:
            errors = {}
            with ThreadPoolExecutor(len(active)) as pool:
                futures = [(engine.name, pool.submit(action, engine)) for engine in active]
            for name, future in futures:
                error = future.exception()
                if error is not None:
                    errors[name] = str(error) if isinstance(error, PolyshardError) else first_line(error)
            return errors

        own = run_in_step(self._ranks, all_engines, "sync failed", WeightSyncError)
        for rank, errors in enumerate(self._ranks.gather(own)):
            for name, text in errors.items():
                failures.setdefault(name, []).append((rank, text))

    def _require_idle(self, engine: NetworkEngine) -> None:
        client = engine.client
        if client is None:
            return
        requests = run_within(self._timeout, client.unfinished)
        if requests and engine.incomplete:
            run_within(self._timeout, lambda: client.abort(requests))  # the model has refused them
        elif requests:
            raise WeightSyncError(
                f"it has {len(requests)} unfinished requests: their KV cache was computed with the old weights. Let "
                "them finish, or abort them, before a sync"
            )

    def _announce(self, engine: NetworkEngine) -> None:
        """On the first rank: make a store, and tell the engine where it is."""
        if engine.client is None:
            return
        host = local_address(self._interface, engine.client.host)
        store = make_store(self._timeout)
        engine.store, engine.address = store, (host, store.port)
        info = {"host": host, "port": store.port, "senders": self._ranks.size, "timeout": self._timeout}
        engine.call("init_weight_transfer_engine", {"init_info": {**info, "stage": "announce"}})

    def _share_addresses(self, active: Sequence[NetworkEngine]) -> None:
        known = self._ranks.broadcast([engine.address for engine in active])
        for engine, address in zip(active, known):
            engine.address = address

    def _plan(self, engine: NetworkEngine) -> None:
        """Read what the workers keep, and tell them what this rank will send."""
        assert engine.address is not None
        host, port = engine.address
        if engine.store is None:
            engine.store = open_store(host, port, self._timeout)
        own = local_address(self._interface, host)
        hello = Link(engine.store, 0, 1, self._timeout, own)
        first = engine.ready(hello, 0)
        reports = [first, *(engine.ready(hello, worker) for worker in range(1, first["workers"]))]
        exact = None if first["exact"] is None else ExactIdentity(*first["exact"])
        check_same_mode(identity_of(self._context), exact, engine.name)
        served = merged(report.get("computation") or {} for report in reports)
        check_same_computation(self._computation, served, ("the trainer", engine.name))
        everything = [Need(name=n, shape=s, boxes=(((0,) * len(s), s),)) for n, s in self._shapes.items()]
        if self._ranks.rank == 0 and any(report["needs"] is None for report in reports):
            hello.publish("tensors", [need.to_json() for need in everything])
        needs = [
            everything if report["needs"] is None else [Need.from_json(fields) for fields in report["needs"]]
            for report in reports
        ]
        check_names(self._shapes, needs)
        engine.workers, engine.identity = len(reports), first["identity"]
        self.dtype = getattr(torch, first["dtype"])
        size = self._ranks.size + engine.workers
        engine.link = Link(engine.store, self._ranks.rank, size, self._timeout, own)
        engine.sender = NetworkSender(
            engine.link,
            self._ranks.rank,
            self._ranks.size,
            self.dtype,
            needs,
            held_regions(self._view, self._axis, self._own),
            set(self._shapes),
            self._chunk_bytes,
        )
        if engine.client is not None and any(report["open"] for report in reports):
            engine.call("finish_weight_update", None)  # of a trainer that died

    def _require_different(self, active: Sequence[NetworkEngine]) -> None:
        """Raise on all ranks if an engine was given under two names: the second connection would replace the first."""
        names, twice = {engine.name for engine in active}, ""
        known = {engine.identity: engine.name for engine in self._engines if engine.name not in names}
        for engine in active:
            if engine.identity is not None and known.setdefault(engine.identity, engine.name) != engine.name:
                twice = f"{known[engine.identity]} and {engine.name} are one engine. Pass it once."
        twice = self._ranks.broadcast(twice)
        if twice:
            self.close()  # the engine knows its last connection only
            raise ConfigurationError(twice)

    def _connect(self, engine: NetworkEngine) -> None:
        assert engine.sender is not None
        if engine.client is None:
            engine.sender.connect()
            return
        call = engine.start_call("init_weight_transfer_engine", {"init_info": {"stage": "connect"}})
        engine.sender.connect()
        engine.answer(call, "init_weight_transfer_engine")
        engine.require("connected")

    def _begin(self, engine: NetworkEngine) -> None:
        engine.incomplete = True
        if engine.client is not None:
            engine.call("start_weight_update", None)

    def _transfer(self, engine: NetworkEngine, version: str) -> None:
        assert engine.sender is not None
        call = None
        if engine.client is not None:
            info = {"update": self._update, "over_network": True, "version": version}
            call = engine.start_call("update_weights", {"update_info": info})
        try:
            engine.sender.send(self._update, self._view.pieces())
        except WeightSyncError as error:
            if call is not None:
                engine.raise_account(call, error)
            raise
        if call is not None:
            engine.answer(call, "update_weights")
            engine.require("loaded")

    def _finish(self, engine: NetworkEngine, version: str) -> None:
        client = engine.client
        if client is None:
            engine.incomplete = False
            return
        engine.call("finish_weight_update", None)
        engine.require("finished")
        if not run_within(self._timeout, lambda: client.forget_cached(version)):
            raise WeightSyncError("it did not reset its prefix cache, because requests are unfinished")
        engine.incomplete = False

    def _responsibilities(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], dict[str, tuple[int, ...]]]:
        """Return the names that this rank's pipeline stage sends, and the shapes of all tensors of the model."""
        pipeline = self._context.axis("pipeline")
        if pipeline.size == 1:
            return list(shapes), dict(shapes)
        owners: dict[str, int] = {}
        everything: dict[str, tuple[int, ...]] = {}
        for stage, held in sorted(self._ranks.gather((pipeline.rank, dict(shapes))), key=lambda part: part[0]):
            for name, shape in held.items():
                everything.setdefault(name, shape)
                owners.setdefault(name, stage)  # a tied embedding is in the first stage and in the last
        return [name for name in shapes if owners[name] == pipeline.rank], everything


def _told(errors: Sequence[tuple[int, str]]) -> str:
    """Return the account of the first rank, which calls the engine, or those of the ranks that differ."""
    texts: dict[str, list[int]] = {}
    for rank, text in errors:
        texts.setdefault(text, []).append(rank)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{text} (seen by trainer ranks {', '.join(map(str, ranks))})" for text, ranks in texts.items())
