"""The code blocks of a page, as a newcomer types them into a new directory."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.servers import ENGINE_WITHOUT_WORKER_PROCESS


def code_blocks(page, language):
    """Return the blocks of one language, in the order of the page."""
    return [text for name, text in re.findall(r"```(\w+)\n(.*?)```", page, flags=re.S) if name == language]


@dataclass
class Newcomer:
    """A directory with the files of a page, and the environment of somebody who has just installed polyshard."""

    folder: Path
    env: dict

    def types(self, command, timeout=200):
        """Run a block of shell commands and return what it prints."""
        done = subprocess.run(
            ["bash", "-ec", command], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-5000:]}"
        return done.stdout


def newcomer_with_files(page, folder):
    """Write the Python blocks of a page to files, which their first lines name."""
    for block in code_blocks(page, "python"):
        ast.parse(block)
        (folder / re.match(r"# (\w+\.py)\n", block).group(1)).write_text(block)
    # Settings that only speed up the test: one thread, no compilation, a small KV cache, and no worker process beside
    # that of the engine (ENGINE_WITHOUT_WORKER_PROCESS).
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env |= {"PYTHONPATH": "", **ENGINE_WITHOUT_WORKER_PROCESS}
    env.pop("VLLM_LOGGING_LEVEL", None)
    return Newcomer(folder, env)
