"""The connection between trainer ranks and an engine's workers: a gloo group for data, its store for reports.

Both are made for one engine and beside all other groups. The first trainer rank keeps the store, whose port the system
chooses. Connections between two processes are opened at their first message, so ranks that exchange nothing have none.
"""

from __future__ import annotations

import json
import os
import socket
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from polyshard.core.errors import WeightSyncError

CHUNK_BYTES = 16 << 20
WINDOW_BYTES = 3 * CHUNK_BYTES  # in flight
WINDOW = 24  # messages in flight at most
_CONNECT = 30.0  # seconds at most until the store answers


class Link:
    """One process's end of the connection.

    Args:
        store: the store.
        number: this process's number: trainer ranks come first, then workers.
        size: the number of trainer ranks and workers.
        timeout: seconds after which a message that has not been received is an error.
        address: this machine's address, from which the other processes are reached.
    """

    def __init__(self, store: dist.Store, number: int, size: int, timeout: float, address: str) -> None:
        self._store, self._number, self._size, self._timeout = store, number, size, timeout
        self._address = address
        self._group: Any = None

    def connect(self) -> None:
        """Create the group. Every process must call it."""
        gloo: Any = dist.ProcessGroupGloo  # the options have no public constructor
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._address, lazy_init=True)]
        options._timeout = timedelta(seconds=self._timeout)
        store = dist.PrefixStore("group", self._store)
        self._group = gloo(store, self._number, self._size, options)

    def disconnect(self) -> None:
        """Close all connections: every process that waits for this one then gets an error."""
        self._group = None

    def send(self, buffer: torch.Tensor, to: int, tag: int) -> Any:
        """Start to send a buffer; the returned work has a `wait`."""
        return self._group.send([buffer], to, tag)

    def receive(self, buffer: torch.Tensor, sender: int, tag: int) -> Any:
        """Start to receive a buffer; the returned work has a `wait`."""
        return self._group.recv([buffer], sender, tag)

    def publish(self, key: str, value: Any) -> None:
        """Write JSON to the store."""
        self._store.set(key, json.dumps(value))

    def read(self, key: str, seconds: float | None = None) -> Any:
        """Return JSON from the store; wait for it at most this time, or the timeout.

        Raises:
            TimeoutError: it has not been written in time.
        """
        try:
            self._store.wait([key], timedelta(seconds=self._timeout if seconds is None else seconds))
        except dist.DistStoreError as error:
            raise TimeoutError(f"nothing was written to {key!r}") from error
        return json.loads(self._store.get(key))

    def delete(self, key: str) -> None:
        """Remove a key from the store."""
        self._store.delete_key(key)


class Window:
    """Messages in flight, in order, bounded in number and size."""

    def __init__(self) -> None:
        self._flying: deque[tuple[Any, int]] = deque()
        self._nbytes = 0
        self._free: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._flying)

    def admits(self, nbytes: int) -> bool:
        """Whether a message of this size may start; one always may."""
        return not self._flying or (len(self._flying) < WINDOW and self._nbytes + nbytes <= WINDOW_BYTES)

    def push(self, flight: Any, nbytes: int) -> None:
        """Add a message that has started."""
        self._flying.append((flight, nbytes))
        self._nbytes += nbytes

    def pop(self) -> Any:
        """Remove the oldest message, and return what was pushed."""
        flight, nbytes = self._flying.popleft()
        self._nbytes -= nbytes
        return flight

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Return a buffer of at least this size, one that was given back if there is one."""
        for index, buffer in enumerate(self._free):
            if len(buffer) >= nbytes:
                return self._free.pop(index)
        return torch.empty(max(nbytes, CHUNK_BYTES), dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take a buffer back for another message."""
        self._free.append(buffer)


def make_store(timeout: float) -> dist.TCPStore:
    """Create a store in this process, on a free port that the system chooses."""
    return dist.TCPStore("localhost", 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)


def open_store(host: str, port: int, timeout: float) -> dist.TCPStore:
    """Connect to the store of another process.

    Raises:
        WeightSyncError: it cannot be reached.
    """
    seconds = min(timeout, _CONNECT)
    try:
        store = dist.TCPStore(host, port, None, False, timedelta(seconds=seconds))
    except (dist.DistError, RuntimeError) as error:
        raise WeightSyncError(
            f"the first trainer rank's store at {host}:{port} cannot be reached from {socket.gethostname()}: "
            f"{first_line(error)}. Pass interface= to name the network that trainer and engines share."
        ) from error
    store.set_timeout(timedelta(seconds=timeout))
    return store


def local_address(interface: str | None, peer: str) -> str:
    """Return this machine's address on an interface, or on the route to a peer.

    Args:
        interface: name of the interface, or the address itself; by default `GLOO_SOCKET_IFNAME`.
        peer: host name or address of the peer, whose route decides if no interface is named.

    Raises:
        WeightSyncError: the interface does not exist or has no address, or the peer's name is unknown.

    Examples:
        >>> local_address(None, "127.0.0.1")
        '127.0.0.1'
    """
    named = interface or os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if named:
        return _address_of(named)
    try:
        family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: the system chooses the route
            return probe.getsockname()[0]
    except OSError as error:
        raise WeightSyncError(f"there is no route to {peer!r}: {error}. Pass interface=.") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _address_of(interface: str) -> str:
    import psutil  # a dependency of vLLM

    found = psutil.net_if_addrs()
    if interface not in found:
        try:
            socket.getaddrinfo(interface, None, flags=socket.AI_NUMERICHOST)
        except OSError:
            raise WeightSyncError(
                f"the network interface is unknown: got {interface!r}, expected an address or one of "
                f"{', '.join(sorted(found))}."
            ) from None
        return interface
    for family in (socket.AF_INET, socket.AF_INET6):
        for address in found[interface]:
            if address.family == family:
                return address.address
    raise WeightSyncError(f"the network interface {interface!r} has no address.")
