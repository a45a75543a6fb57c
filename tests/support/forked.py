"""Start a script as `python script.py ...` would, forked from a process that has imported torch and vLLM.

The imports of a script that runs an engine take longer than most of what it does. A forked script has its own
arguments, environment, working directory and output, is `__main__`, and ends as an interpreter does. Scripts that are
tested for what they import are to be started by `subprocess`.
"""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import process as processes
from pathlib import Path
from typing import Any

from support.warm_spawn import WarmContext, read_settings


def start(script: Path, arguments: Sequence[str], env: Mapping[str, str], out: Path, err: Path, cwd: Any = None) -> Any:
    """Start a script in a process group of its own, whose output goes to files; return its process."""
    context = WarmContext()
    target = (str(script), [str(part) for part in arguments], dict(env), str(cwd or os.getcwd()), str(out), str(err))
    process = context.Process(target=_main, args=target)
    process.start()
    return process


def run(
    script: Path, arguments: Sequence[str], env: Mapping[str, str], timeout: float, cwd: Any = None
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as `subprocess.run` with captured text."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(script, arguments, env, out, err, cwd)
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        told = [file.read_text(errors="replace") if file.exists() else "" for file in (out, err)]
    if late:
        raise subprocess.TimeoutExpired([str(script), *arguments], timeout, *told)
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, *told)


def script_of_rank(script: Path, arguments: Sequence[str], env: Mapping[str, str]) -> None:
    """Run a script on a rank of `run_ranks`, which has torchrun's environment variables."""
    os.environ.update(env)
    sys.path.insert(0, str(script.parent))
    sys.argv[:] = [str(script), *map(str, arguments)]
    _as_first_process()
    read_settings()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def _main(script: str, arguments: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    os.setsid()
    _redirect(out, err)
    os.chdir(cwd)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # of the environment
    own = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [os.path.dirname(script), *own, *(path for path in sys.path if path and path not in inherited)]
    sys.argv[:] = [script, *arguments]
    _as_first_process()
    read_settings()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def _redirect(out: str, err: str) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream.fileno())
        os.close(file)


def _as_first_process() -> None:
    """Let multiprocessing take this process for one that no other has started: it may have children."""
    processes._parent_process = None
    processes._current_process._config["daemon"] = False
    processes._current_process._name = "MainProcess"
