"""The end of a training script."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import polyshard as ps
from polyshard.launch.ranks import free_port
from polyshard.testing import run_ranks

WITH_A_LATE_RELEASE = """
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
    done = subprocess.run([sys.executable, "-c", WITH_A_LATE_RELEASE], env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0


def save_and_end(directory):
    context = ps.initialize("torch")
    torch.manual_seed(0)
    model = torch.nn.Linear(500, 500)
    first = ps.save_checkpoint(model, f"{directory}-before", context, config={}, asynchronous=True)
    ps.save_checkpoint(model, directory, context, config={}, asynchronous=True)
    assert first.done()  # at most one copy of the weights exists
    ps.shutdown(context)
    return context.background


def test_shutdown_waits_for_a_save_that_nobody_waited_for(tmp_path):
    assert run_ranks(save_and_end, 2, str(tmp_path / "saved"), timeout=60) == [[], []]
    torch.manual_seed(0)
    assert load_file(tmp_path / "saved" / "model.safetensors")["weight"].equal(torch.nn.Linear(500, 500).weight)


def test_shutdown_raises_the_error_of_a_save_that_nobody_waited_for(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(ps.CheckpointError, match="saving .* failed"):
        save_and_end(tmp_path / "file" / "saved")
    assert "a save failed: saving " in caplog.text


WITHOUT_SHUTDOWN = """
import sys
import torch
import polyshard as ps

context = ps.initialize("torch")
ps.save_checkpoint(torch.nn.Linear(3000, 3000), sys.argv[1], context, config={}, asynchronous=True)
"""


def test_a_script_ends_after_its_save_in_the_background(tmp_path):
    """The interpreter closes thread pools before it waits for threads; the save needs them."""
    subprocess.run([sys.executable, "-c", WITHOUT_SHUTDOWN, str(tmp_path / "saved")], check=True, timeout=120)
    assert (tmp_path / "saved" / "polyshard.json").exists()
