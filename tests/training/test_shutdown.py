"""The end of a training script."""

import os
import subprocess
import sys

from polyshard.launch.ranks import free_port

SCRIPT = """
import time
import torch
import polyshard as ps

class SlowToDelete:
    def __del__(self):
        time.sleep(2.0)  # without the interpreter lock, which the thread needs once more afterwards

context = ps.initialize("torch")
tensor = torch.ones(1)
tensor.attribute = SlowToDelete()
context.axis("tensor").group.allreduce([tensor])  # gloo's worker thread holds the last reference
del tensor
time.sleep(0.2)
ps.shutdown(context)
"""


def test_a_process_ends_well_though_a_worker_thread_of_gloo_still_releases_a_tensor():
    """Without the wait in `shutdown`, the interpreter ends first, and the process aborts: exit code -6."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0
