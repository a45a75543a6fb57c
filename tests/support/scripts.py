"""Scripts for tests, each in processes of its own."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import subprocess
from pathlib import Path

import torch

from polyshard.launch.ranks import run_ranks
from support.paths import EXAMPLES, ROOT


def run(command, **environment):
    """What the script prints after RESULT."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(EXAMPLES)])
    return result_of(subprocess.run(command, capture_output=True, text=True, timeout=240, env=env))


def result_of(done):
    """What a script that was run printed after RESULT."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(lines[0].removeprefix("RESULT"))


@contextlib.contextmanager
def one_engine_of_torchruns():
    """vLLM on CPU names the shared memory of an engine whose ranks torchrun started alike in every run (0.32,
    v1/worker/cpu_worker.py, VLLM_DIST_IDENT), so that two at a time end in "create shm in SHMManager failed"; so does
    one after a run that was killed."""
    folder = os.open("/dev/shm", os.O_RDONLY)  # what they share is what is locked, and no file is left behind
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for left in Path("/dev/shm").glob("-*-cpushm_*"):
            left.unlink()
        yield
    finally:
        os.close(folder)


def on_engine_ranks(function, ranks, *arguments):
    """Call it on ranks that are engine ranks too, as torchrun would: what each returned.

    The server that forks them has imported vLLM (conftest.py), which takes longer than what they do.
    """
    with one_engine_of_torchruns():
        return run_ranks(_with_engines, ranks, function, *arguments, timeout=280)


def _with_engines(function, *arguments):
    multiprocessing.current_process()._config["daemon"] = False  # an engine may have processes of its own
    torch._dynamo.config.disable = True
    return function(*arguments)
