"""Scripts for tests, each in processes of its own."""

import json
import os
import subprocess
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
