"""One engine that is reached over the network, as a trainer rank knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from polyshard.adapters.vllm.clients.protocol import Client
from polyshard.adapters.vllm.transfer.link import Link, first_line
from polyshard.adapters.vllm.transfer.network_sender import NetworkSender
from polyshard.core.errors import WeightSyncError
from polyshard.core.waiting import Background

_REPORT = 30.0  # seconds until a worker's report must be in the store, once the engine has answered
_ACCOUNT = 3.0  # seconds in which an engine may give its own account of a failure


@dataclass(slots=True)
class NetworkEngine:
    """An engine, its connection, and the calls to it.

    Attributes:
        name: the engine's name.
        client: the client that calls it, on the first rank.
        timeout: seconds until a call without an answer is an error.
        address: the store's host and port, while connected.
        store: the store, while connected.
        link: this rank's end of the connection.
        sender: what this rank sends; None until connected.
        workers: the number of its workers.
        identity: of its first worker, which the engine has under any name or address.
        pending: the call that has not been answered, on the first rank.
        incomplete: whether an update has begun and not completed, so that the model refuses to compute.
    """

    name: str
    client: Client | None
    timeout: float
    address: tuple[str, int] | None = None
    store: dist.Store | None = None
    link: Link | None = None
    sender: NetworkSender | None = None
    workers: int = 0
    identity: str | None = None
    pending: Background[Any] | None = None
    incomplete: bool = False

    def drop(self) -> None:
        """Close the connection; the next sync makes another."""
        self.sender = self.link = self.store = self.address = None

    def ready(self, link: Link, worker: int) -> dict[str, Any]:
        """Return what a worker has written into the store: its layout and its engine's settings."""
        try:
            return link.read(f"ready/{worker}", min(_REPORT, self.timeout))
        except TimeoutError:
            raise WeightSyncError(
                f"worker {worker} has not reached the trainer's store at {self.address}. Pass interface= to name the "
                "network that trainer and engines share"
            ) from None

    def call(self, method: str, payload: Mapping[str, Any] | None) -> None:
        """Call a method, and wait for its end. On the first rank."""
        self.answer(self.start_call(method, payload), method)

    def start_call(self, method: str, payload: Mapping[str, Any] | None) -> Background[None]:
        """Call a method in a thread."""
        client = self.client
        assert client is not None
        if self.pending is not None and not self.pending.wait(self.timeout):  # calls are answered in order
            raise WeightSyncError("it does not answer: it died, froze, or cannot be reached (an earlier call is open)")
        self.pending = Background(lambda: client.call(method, payload), method)
        return self.pending

    def answer(self, call: Background[None], method: str) -> None:
        """Wait for the end of a call.

        Raises:
            WeightSyncError: it failed, or did not end in time.
        """
        if not call.wait(self.timeout):
            raise WeightSyncError(
                f"no answer to {method} within {self.timeout:g} s: the engine died, froze, or cannot be reached"
            )
        if call.error is not None:
            raise WeightSyncError(f"{method} failed: {first_line(call.error)}") from call.error

    def require(self, state: str) -> None:
        """Raise `WeightSyncError` unless every worker reports this state."""
        assert self.link is not None
        for worker in range(self.workers):
            try:
                report = self.link.read(f"report/{worker}", min(_REPORT, self.timeout))
            except TimeoutError:
                raise WeightSyncError(
                    f"worker {worker} does not report to this trainer: another trainer has connected to the engine",
                    ranks=(worker,),
                ) from None
            if report["state"] != state:
                told = report["error"] or f"is {report['state']}"
                raise WeightSyncError(f"worker {worker}: {told}", tuple(report["tensors"]), (worker,))

    def raise_account(self, call: Background[None], error: WeightSyncError) -> None:
        """Raise the workers' own account of a failed transfer if they give one, else `error`."""
        if call.wait(_ACCOUNT) and call.error is None:
            self.require("loaded")
        raise error
