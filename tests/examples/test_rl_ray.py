"""The loop of reinforcement learning on real Ray, of which an engine and a trainer rank are killed."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support.paths import EXAMPLES

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
SETTINGS = ["--prompts", "8", "--samples", "8", "--steps", "40", "--every", "2", "--staleness", "1"]
STEPS, EVERY = 40, 2


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of Ray: the second has place for one rank only."""
    from ray.cluster_utils import Cluster

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


def test_a_run_continues_after_an_engine_and_a_rank_were_killed(cluster, tmp_path):
    cluster.add_node(num_cpus=1)
    command = [sys.executable, str(EXAMPLES / "rl.py"), str(tmp_path), *SETTINGS, "--ray", "--ranks", "2"]
    environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": cluster.address}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        await_steps(tmp_path, 4, run)
        (engine,) = actors("ray::Engine", cluster)
        os.kill(engine.pid, signal.SIGKILL)
        done = await_steps(tmp_path, 7, run)
        rank = actors("ray::Rank", cluster)[0]
        os.kill(rank.pid, signal.SIGKILL)
        least = done
        while run.poll() is None:
            least = min(least, len(metrics_of(tmp_path)))
            time.sleep(0.05)
        output = run.communicate(timeout=200)[0]
    finally:
        run.kill()
    assert run.returncode == 0, output[-3000:]
    assert "All ranks are replaced" in output
    assert least >= done // EVERY * EVERY, "it continued from its last state, and not from an earlier one"
    metrics = metrics_of(tmp_path)
    assert [step["step"] for step in metrics] == list(range(1, STEPS + 1))
    assert {step["staleness"] for step in metrics} == {0, 1}
    assert all(step["bits_differ"] == 0.0 for step in metrics), "a token of the current weights has other bits"
    for step in metrics:
        if step["staleness"] == 0:
            assert step["ratio"] == 1.0
        assert abs(step["ratio"] - 1.0) < 0.1
    assert (tmp_path / "policy" / "model.safetensors").exists()


def metrics_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def await_steps(folder, count, run):
    """Wait until the run has done this many steps; return how many it has done."""
    deadline = time.monotonic() + 240
    while len(metrics_of(folder)) < count:
        assert time.monotonic() < deadline, metrics_of(folder)
        assert run.poll() is None, run.stdout.read()[-3000:]
        time.sleep(0.05)
    return len(metrics_of(folder))


def actors(title, cluster):
    """The processes of actors on the cluster's machines; Ray writes the class into their titles."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    found = []
    for process in psutil.process_iter():
        try:
            if process.name().startswith("ray::") and process.cmdline()[0].startswith(title):
                found += [process] if raylets & {parent.pid for parent in process.parents()} else []
        except (psutil.Error, IndexError):
            continue
    return found
