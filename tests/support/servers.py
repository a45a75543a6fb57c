"""A server that a command starts, for tests that talk to it."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.request

from support import forked
from support.warm_spawn import descendants

# vLLM on CPU (0.32, platforms/cpu.py) starts the engine of one rank in two processes, each of which imports everything
# anew, if this variable is "1". Any other true value leaves the worker in the engine's process, as on a GPU.
ENGINE_WITHOUT_WORKER_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "01"}


@contextlib.contextmanager
def running_server(command, port, log, env, cwd=None):
    """Run `command` until its `/health` answers on `port`; end its process group afterwards."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=cwd, start_new_session=True)
    with _until_it_ends(process.pid, process.poll, process.wait, command, port, log):
        yield


@contextlib.contextmanager
def running_script(script, arguments, port, log, env):
    """The same of a Python script, forked from a process that has imported vLLM (forked.py)."""
    process = forked.start(script, arguments, env, log, log)

    def wait(seconds=None):
        process.join(seconds)
        if process.is_alive():
            raise subprocess.TimeoutExpired(str(script), seconds or 0)

    with _until_it_ends(process.pid, lambda: process.exitcode, wait, [script, *arguments], port, log):
        yield
    for child in descendants(process.pid):  # no members of its process group
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


@contextlib.contextmanager
def _until_it_ends(group, poll, wait, command, port, log):
    try:
        deadline = time.monotonic() + 180
        while True:
            assert poll() is None, f"{command} ended with {poll()}:\n{log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"{command} did not come up:\n{log.read_text()[-6000:]}"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        wait()
