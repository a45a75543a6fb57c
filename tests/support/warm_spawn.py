"""Fork the processes that libraries spawn from the server that has imported torch and vLLM.

vLLM on CPU spawns its engines and workers, and each imports vLLM for six seconds. A process of this context starts as
a spawned one does: with the environment, working directory, output and module search path of its parent, and with
nothing else of it. `install` puts the context in the place of "spawn", in this process and in those it starts.
"""

from __future__ import annotations

import os
import tempfile
from multiprocessing import context, forkserver, reduction
from pathlib import Path
from typing import Any

# A process with this environment variable starts a server of its own for its children, which imports everything again:
# vLLM's engine does not end when a worker of it that the common server has forked is killed.
OWN_SERVER = "POLYSHARD_TESTS_OWN_SERVER"


class _WarmProcess(context.ForkServerProcess):
    """A process that takes from its parent what an executed interpreter would."""

    def start(self) -> None:
        forkserver.ensure_running()
        server = forkserver._forkserver._forkserver_address
        self._from_parent = (dict(os.environ), os.getcwd(), server)
        super().start()
        with _children_file(os.getpid()).open("a") as file:
            file.write(f"{self.pid}\n")

    def __getstate__(self) -> dict[str, Any]:
        """Pickled once, while the process starts."""
        return {**self.__dict__, "_streams": [(stream, reduction.DupFd(stream)) for stream in (1, 2)]}

    def _bootstrap(self, *arguments: Any, **options: Any) -> Any:
        environment, folder, server = self._from_parent
        for stream, inherited in self.__dict__.pop("_streams"):
            os.dup2(inherited.detach(), stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        tempfile.tempdir = None  # of the environment
        read_settings()
        _share_server(server)
        install()
        return super()._bootstrap(*arguments, **options)


class WarmContext(context.ForkServerContext):
    """The context, for tests that start such processes themselves."""

    Process = _WarmProcess


def _children_file(pid: int) -> Path:
    return Path(forkserver._forkserver._forkserver_address).parent / f"children-of-{pid}"


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started in this way, and those that they have started.

    For the system they are children of the server.
    """
    file = _children_file(pid)
    started = [int(line) for line in file.read_text().split()] if file.exists() else []
    return [found for child in started for found in (child, *descendants(child))]


def read_settings() -> None:
    """Apply what torch reads from the environment when it is imported."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch._dynamo.config.disable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"


def server() -> str:
    """Return the address of this process's server, for `use`."""
    forkserver.ensure_running()
    return forkserver._forkserver._forkserver_address


def use(address: str) -> None:
    """Fork the processes that this one spawns, a rank of `run_ranks`, from the server that has forked it."""
    _share_server(address)
    install()


def _share_server(address: str) -> None:
    """Let this process, which the server at `address` has forked, use it as the process that started it does."""
    forkserver._forkserver._forkserver_address = address
    forkserver._forkserver.ensure_running = lambda: None
    if OWN_SERVER not in os.environ:
        forkserver.ensure_running = lambda: None  # another name of the same method, which `start` calls
    context._concrete_contexts["forkserver"] = WarmContext()


def install() -> None:
    """Use the context for "spawn" from here on."""
    context._concrete_contexts["spawn"] = WarmContext()
