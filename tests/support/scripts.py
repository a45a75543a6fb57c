"""Scripts for tests, each in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def run(command, **environment):
    """What the script prints after RESULT."""
    root = SUPPORT.parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(root / "tests"), str(root / "examples")])
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return json.loads(lines[0].removeprefix("RESULT"))


def torchrun(ranks, script, *arguments, check=True):
    """Run a script of this folder on several ranks; what it did."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(SUPPORT / script)]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=280, env=dict(os.environ)
    )
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
