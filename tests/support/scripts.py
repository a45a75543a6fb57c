"""Scripts for tests, each in processes of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

SUPPORT = Path(__file__).parent


def run(command, **environment):
    """What the script prints after RESULT."""
    root = SUPPORT.parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(root / "tests"), str(root / "examples")])
    return result_of(subprocess.run(command, capture_output=True, text=True, timeout=240, env=env))


def result_of(done):
    """What a script that was run printed after RESULT."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(lines[0].removeprefix("RESULT"))


def one_engine_of_torchruns():
    """vLLM on CPU names the shared memory of an engine whose ranks torchrun started alike in every run (0.32,
    v1/worker/cpu_worker.py, VLLM_DIST_IDENT), so that two at a time end in "create shm in SHMManager failed"."""
    return FileLock(Path(tempfile.gettempdir()) / "polyshard-tests-torchrun.lock")


def torchrun(ranks, script, *arguments, check=True):
    """Run a script of this folder on several ranks; what it did."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, str(SUPPORT / script)]
    with one_engine_of_torchruns():
        for left in Path("/dev/shm").glob(
            "-*-cpushm_*"
        ):  # by a run that was killed: the next would end like two at a time
            left.unlink()
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, timeout=280, env=dict(os.environ)
        )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
