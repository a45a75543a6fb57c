"""Running a function on several ranks of this machine."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

# Set before the fork server checks for a GPU: the check through CUDA would prevent its children from using one.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# Modules that every rank imports; the first optimizer imports torch._dynamo.
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "polyshard.launch.ranks",
    "polyshard.adapters.torch.engine",
]

_STACKS = signal.SIGUSR1  # on which a rank prints the stacks of its threads
_HUNG = "did not finish within {:.0f} s, or within 10 s of another rank's error; its stacks are on standard error"


class RankError(AssertionError):
    """Failure of one or more ranks; the message contains each rank's traceback, or how it ended.

    Examples:
        >>> import math
        >>> run_ranks(math.sqrt, 1, -1.0)
        Traceback (most recent call last):
        polyshard.launch.ranks.RankError: ...
    """


def free_port() -> int:
    """Return a TCP port that was free at the time of the call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _agent_store() -> dist.TCPStore:
    """Return a store hosted by this process, as by torchrun's agent, on a port that no other process can take."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _environment_of_ranks(
    world_size: int, store: dist.TCPStore | None, gpus: bool | Literal["shared"]
) -> list[dict[str, str]]:
    """Return each rank's environment variables, as set by torchrun, or without a store by a simple launcher."""
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port if store else free_port()),
        "TORCHELASTIC_USE_AGENT_STORE": str(store is not None),
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        **({"POLYSHARD_BACKEND": "gloo"} if gpus == "shared" else {}),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    silent: tuple[int, ...] = (),
    agent: bool = True,
    gpus: bool | Literal["shared"] = True,
) -> list[Any]:
    """Call `function(*args)` on each rank, in processes with torchrun's environment variables.

    Args:
        function: a function at the top level of a module.
        world_size: number of processes.
        args: picklable arguments, the same for all ranks.
        timeout: seconds after which all ranks are killed.
        silent: ranks that are expected to crash or hang; their results are not awaited.
        agent: whether this process hosts the store, as torchrun's agent does; otherwise rank 0 hosts it.
        gpus: whether the ranks see this machine's GPUs; with `"shared"` they also use gloo, so that several ranks can
            share one GPU.

    Returns:
        The result of each rank, in rank order (picklable; tensors on the CPU); None for ranks without a result.

    Raises:
        RankError: a rank raised an error, crashed, or did not finish in time.

    Examples:
        >>> from polyshard.testing import run_ranks
        >>> import math
        >>> run_ranks(math.sqrt, 2, 16.0)
        [4.0, 4.0]
    """
    # A fork server that has imported torch starts a rank in milliseconds, and has no threads yet.
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(PRELOAD)
    store = _agent_store() if agent else None
    environment = _environment_of_ranks(world_size, store, gpus)
    started, pipes = [], []
    for rank in range(world_size):
        receiving, sending = spawn.Pipe(duplex=False)
        process = spawn.Process(
            target=_run,
            args=(function, args, environment[rank], sending),
            name=f"rank {rank}",
            daemon=True,
        )
        process.start()
        sending.close()
        started.append(process)
        pipes.append(receiving)
    try:
        return _collect(started, pipes, timeout, silent)
    except RankError:
        _print_stacks([process for rank, process in enumerate(started) if rank not in silent and process.is_alive()])
        raise
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()


def _print_stacks(processes: list[Any]) -> None:
    """Let processes that hang print the stacks of their threads to standard error."""
    for process in processes:
        os.kill(process.pid, _STACKS)
    if processes:
        time.sleep(0.5)


def _run(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    pipe: Connection,
) -> None:
    os.environ.update(environment)
    stderr = sys.__stderr__ or sys.stderr
    faulthandler.enable(stderr)  # a crash in native code prints where Python was
    faulthandler.register(_STACKS, stderr)
    torch.set_num_threads(1)
    try:
        answer = ("returned", tree_map_only(torch.Tensor, torch.Tensor.cpu, function(*args)))
    except BaseException:
        answer = ("raised", traceback.format_exc())
    # Plain pickle: that of multiprocessing would share tensors with a process that is about to exit.
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()


def _collect(processes: list[Any], pipes: list[Connection], timeout: float, silent: tuple[int, ...]) -> list[Any]:
    deadline = time.monotonic() + timeout
    answers: dict[int, tuple[str, Any]] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    grace: float | None = None
    while set(open_pipes.values()) - set(silent):
        left = min(deadline, grace or deadline) - time.monotonic()
        ready = wait(list(open_pipes), timeout=max(0.0, left))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                answers[rank] = ("died", f"exited with code {processes[rank].exitcode} without a result")
            failed = answers[rank][0] != "returned" and rank not in silent
            if failed and grace is None:
                grace = time.monotonic() + 10.0  # wait for the errors of the other ranks
    troubles = []
    for rank in range(len(processes)):
        kind, content = answers.get(rank, ("hung", _HUNG.format(timeout)))
        if kind == "raised" or (kind != "returned" and rank not in silent):
            troubles.append(f"--- rank {rank} {kind} ---\n{content}")
    if troubles:
        raise RankError("\n" + "\n".join(troubles))
    return [answers[rank][1] if rank in answers and rank not in silent else None for rank in range(len(processes))]
