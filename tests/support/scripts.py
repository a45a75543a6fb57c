"""Run test scripts in separate processes."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import subprocess
from pathlib import Path

import torch

from polyshard.launch.ranks import run_ranks
from support import forked, warm_spawn
from support.paths import EXAMPLES, ROOT


def run(command, **environment):
    """What the script prints after RESULT."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(EXAMPLES)])
    return result_of(subprocess.run(command, capture_output=True, text=True, timeout=240, env=env))


def run_forked(script, *arguments, **environment):
    """What the script prints after RESULT; it is forked, so that its imports cost nothing (forked.py)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(EXAMPLES)])
    return result_of(forked.run(script, arguments, env, timeout=240))


def result_of(done):
    """What a script that was run printed after RESULT."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(lines[0].removeprefix("RESULT"))


@contextlib.contextmanager
def one_engine_of_torchruns():
    """Serialize engines whose ranks torchrun started, and delete the shared memory of killed runs.

    vLLM on CPU gives the shared memory of such engines the same name in every run (0.32, v1/worker/cpu_worker.py,
    VLLM_DIST_IDENT). Two engines at a time, or one after a killed run, fail with "create shm in SHMManager failed".
    """
    folder = os.open("/dev/shm", os.O_RDONLY)  # lock the directory that they share, which leaves no lock file behind
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for left in Path("/dev/shm").glob("-*-cpushm_*"):
            left.unlink()
        yield
    finally:
        os.close(folder)


def on_engine_ranks(function, ranks, *arguments):
    """Call a function on ranks that are also engine ranks, as torchrun would; return the result of each.

    The server that forks them has imported vLLM (conftest.py), which takes longer than what they do.
    """
    with one_engine_of_torchruns():
        return run_ranks(_with_engines, ranks, warm_spawn.server(), function, *arguments, timeout=280)


def _with_engines(server, function, *arguments):
    multiprocessing.current_process()._config["daemon"] = False  # an engine may have processes of its own
    warm_spawn.use(server)
    torch._dynamo.config.disable = True
    return function(*arguments)
