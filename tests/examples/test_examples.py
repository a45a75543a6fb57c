"""The examples as a user runs them: train SmolLM2 at tensor-parallel 3, then generate from what was saved."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import EXAMPLES

pytestmark = pytest.mark.slow


def run(*command, **environment):
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_COMPILE_DISABLE": "1",
        **environment,
    }
    env.pop("PYTHONPATH", None)  # the examples need no path but their own folder
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.vllm
def test_train_at_tensor_parallel_3_and_generate(smollm2, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    small = ["--steps", "3", "--batch", "1", "--length", "48", "--validation-rows", "2", "--learning-rate", "1e-5"]
    sizes = ["--tensor-parallel", "3", "--sequence-parallel", "--precision", "mixed", "--recompute", "selective"]
    output, figures, records = tmp_path / "trained", tmp_path / "figures.json", tmp_path / "records"
    files = ["--figures", figures, "--records", records]
    printed = run(*torchrun, EXAMPLES / "train.py", smollm2, output, *small, *sizes, *files)
    assert "validation loss" in printed
    assert [json.loads(line)["step"] for line in (records / "steps.jsonl").read_text().splitlines()] == [1, 2, 3]
    numbers = json.loads(figures.read_text())
    assert len(numbers["losses"]) == 3
    # Three such small steps move the loss of other rows by less than bfloat16 rounds: whether down depends on the CPU.
    assert 0 < abs(numbers["validation_after"] - numbers["validation_before"]) < 0.02
    assert json.loads((output / "config.json").read_text())["architectures"] == ["PolyshardDecoder"]

    answer = run(
        sys.executable, EXAMPLES / "generate.py", output, "What is the capital of France?", "--max-tokens", "12"
    )
    assert "Paris" in answer


def test_a_size_that_does_not_divide_the_model_is_refused_by_name(smollm2, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "train.py"), str(smollm2), str(tmp_path / "x"), "--tensor-parallel", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "q_proj: 9 blocks of 64 cannot be divided by tensor-parallel size 2" in done.stderr
